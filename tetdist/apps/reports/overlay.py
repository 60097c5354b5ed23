"""Several runs in one figure, seeds as one curve with its standard deviation."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports.style import (
    ACCURACY,
    PERCENT,
    POSITIVE,
    PUBLISHED,
    SERIES,
    finish,
    marker_style,
    markers,
    new_figure,
    save,
    series,
    steady_part,
)

Lines = list[dict[str, Any]]


def runs(
    groups: Mapping[str, Sequence[Lines]],
    title: str,
    out: Path,
    published: tuple[str, list[float], list[float]] | None = None,
) -> None:
    """Draw the curves of several runs into the same axes, with mean and spread of each group.

    The runs of a group differ only in their seed. A published curve of top-1 has a name, epochs and
    percent.
    """
    figure = new_figure(13, 7.6)
    axes = figure.subplot_mosaic("LLLAAA;VVVTTT")
    panels = {
        "L": ("train", "loss", "Training loss", "loss", POSITIVE),
        "A": ("val", "top1", "Validation top-1", ACCURACY, PERCENT),
        "V": ("val", "loss", "Validation loss", "loss", POSITIVE),
    }
    shown: dict[str, Any] = {}
    for panel, (kind, key, heading, unit, limits) in panels.items():
        axis = axes[panel]
        for colour, (name, members) in zip(itertools.cycle(SERIES), groups.items(), strict=False):
            measured = [[line for line in lines if line["kind"] == kind] for lines in members]
            curves = [
                series(steady_part(lines) if kind == "train" else lines, key) for lines in measured
            ]
            label = f"{name} ({len(members)})" if len(members) > 1 else name
            _group(axis, curves, colour, label, limits)
        if published is not None and panel == "A":
            name, epochs, top1 = published
            axis.plot(epochs, top1, "--", color=PUBLISHED, linewidth=1, label=name)
        axis.set_xlabel("epoch")
        finish(axis, heading, unit, legend=False)
        handles, names = axis.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    _group_timesteps(axes["T"], groups)
    if shown:
        names = [textwrap.fill(name, 80) for name in shown]
        longest = max(len(line) for name in names for line in name.splitlines())
        figure.legend(
            list(shown.values()),
            names,
            loc="outside lower center",
            ncols=max(1, min(len(names), 160 // (longest + 8))),  # 160 letters fit into a row
            fontsize=9,
            frameon=False,
        )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    save(figure, out)


def _group(
    axis: Any,
    curves: list[tuple[list[float], list[float]]],
    colour: str,
    label: str,
    limits: tuple[float, float],
) -> None:
    """Draw thin curves of a group's members, and their mean and standard deviation."""
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return
    if len(curves) == 1:
        markers(axis, *curves[0], colour, label)
        return
    for epochs, values in curves:
        marker = marker_style(values)
        axis.plot(epochs, values, marker, color=colour, linewidth=0.7, markersize=2.5, alpha=0.45)
    at_all = sorted(set.intersection(*(set(epochs) for epochs, _ in curves)))
    known = [dict(zip(epochs, values, strict=True)) for epochs, values in curves]
    columns = np.array([[values[epoch] for epoch in at_all] for values in known])
    means, spreads = columns.mean(axis=0), columns.std(axis=0, ddof=1)
    axis.fill_between(
        at_all,
        np.maximum(means - spreads, limits[0]),
        np.minimum(means + spreads, limits[1]),
        color=colour,
        alpha=0.2,
        linewidth=0,
    )
    markers(axis, at_all, means.tolist(), colour, label)


def _group_timesteps(axis: Any, groups: Mapping[str, Sequence[Lines]]) -> None:
    for colour, members in zip(itertools.cycle(SERIES), groups.values(), strict=False):
        curves = []
        for lines in members:
            evaluated = [line for line in lines if line.get("per_timestep_top1")]
            if evaluated:
                top1 = evaluated[-1]["per_timestep_top1"]
                curves.append(([float(t) for t in range(1, len(top1) + 1)], top1))
        _group(axis, curves, colour, "", PERCENT)
    axis.set_xlabel("timesteps averaged")
    axis.xaxis.get_major_locator().set_params(integer=True)
    finish(axis, "Last accuracy by timestep", ACCURACY, legend=False)
