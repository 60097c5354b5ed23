"""Figure of loss landscapes: curves along directions over each other, contours side by side."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports.style import ACCURACY, SERIES, finish, new_figure, save

# The paper draws these two losses of networks trained with either.
DRAWN = {
    "time_mean": "L_SDT: loss of the time-mean",
    "per_timestep": "L_TET: loss of each timestep",
}


def draw(groups: Mapping[str, Sequence[dict[str, Any]]], radius: float, out: Path) -> None:
    """Draw measured networks, those of a group as one.

    A curve is the mean over random directions and networks, with a band of one standard deviation.
    Contours are those of a group's first network; the plots of a row share levels.
    """
    firsts = {name: members[0]["surface"] for name, members in groups.items()}
    rows = 1 + len(DRAWN) * all(firsts.values())
    figure = new_figure(max(13, 4.2 * len(firsts)), 4.4 * rows)
    top, *others = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    axes = top.subplots(1, 3)
    for axis, (key, title) in zip(axes, (DRAWN | {"top1": "Accuracy"}).items(), strict=True):
        for colour, (name, members) in zip(itertools.cycle(SERIES), groups.items(), strict=False):
            curves = [c[key] for one in members for k, c in one["curves"].items() if k.isdigit()]
            mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)
            at = np.linspace(-radius, radius, len(mean))
            band = np.clip([mean - spread, mean + spread], 0, 100 if key == "top1" else None)
            axis.fill_between(at, *band, color=colour, alpha=0.2, linewidth=0)
            axis.plot(at, mean, color=colour, linewidth=1.8, label=f"{name} ({len(members)})")
        axis.set_xlabel("step, relative to the norm of each filter")
        finish(axis, title, ACCURACY if key == "top1" else "loss", legend=False)
    handles, names = axes[0].get_legend_handles_labels()
    top.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    for part, (key, title) in zip(others, DRAWN.items(), strict=False):
        surfaces = [np.array(surface[key]) for surface in firsts.values()]
        lowest, highest = np.min(surfaces), np.max(surfaces)
        levels = np.geomspace(max(lowest, highest / 1e4), highest, 16)
        for axis, name, surface in zip(
            part.subplots(1, len(firsts), squeeze=False)[0], firsts, surfaces, strict=True
        ):
            at = np.linspace(-radius, radius, len(surface))
            lines = axis.contour(at, at, surface, levels=levels, cmap="viridis", linewidths=1.2)
            axis.clabel(lines, lines.levels[::3], fontsize=7, fmt="%.2g")
            axis.plot(0, 0, "+", color="black")
            axis.set_title(f"{name}, {title}", loc="left", fontsize=10)
            axis.set_xlabel("first direction")
            axis.set_ylabel("second direction")
            axis.set_aspect("equal")
    save(figure, out)
