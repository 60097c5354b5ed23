"""Figure of a study: accuracy at every test T, loss or early exit, differences."""

import colorsys
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tetdist.apps.reports.style import (
    ACCURACY,
    LEAST_DIFFERENCE,
    QUIET,
    SERIES,
    finish,
    new_figure,
    widened,
)
from tetdist.apps.studies.numbers import Numbers, at, exit_curve, exit_timesteps, exit_top1, last


def draw(numbers: Numbers) -> Any:
    """Draw the figure."""
    compared = [entry for entry in numbers.entries if numbers.difference(entry, last).n]
    figure = new_figure(15 if compared else 10.4, 4.8)
    axes = figure.subplots(1, 3 if compared else 2)
    styles = styles_of(numbers)
    _timesteps(axes[0], numbers, styles)
    draw_second = _loss if numbers.study.exit_within is None else _early_exit
    draw_second(axes[1], numbers, styles)
    if compared:
        _differences(axes[2], numbers, compared, styles)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(numbers.study.title, fontsize=13, fontweight="bold")
    return figure


def styles_of(numbers: Numbers) -> dict[str, dict[str, Any]]:
    """Return colour, dashes and markers of every entry.

    The control of a single entry has that entry's colour, dashed lines and hollow markers. The
    first control of several entries is grey; further ones have colours of their own.
    """
    entries = numbers.study.entries
    controls = [entry.control for entry in entries.values() if entry.control is not None]
    unused = colours()
    styles: dict[str, dict[str, Any]] = {
        name: {"color": next(unused), "linestyle": "-"} for name in entries if name not in controls
    }
    of_several = itertools.chain([QUIET], unused)
    for control in dict.fromkeys(controls):
        served = [name for name, entry in entries.items() if entry.control == control]
        shared = len(served) > 1 or served[0] in controls
        colour = next(of_several) if shared else styles[served[0]]["color"]
        styles[control] = {"color": colour, "linestyle": (0, (4, 2)), "markerfacecolor": "white"}
    return styles


def colours() -> Iterator[str]:
    """Yield distinct colours without end."""
    yield from SERIES
    # Steps of the golden ratio never return to the same hue.
    for i in itertools.count():
        channels = colorsys.hls_to_rgb(i * 0.618034 % 1, 0.4, 0.6)
        yield "#" + "".join(f"{round(channel * 255):02x}" for channel in channels)


def _timesteps(axis: Any, numbers: Numbers, styles: dict[str, dict[str, Any]]) -> None:
    """Plot the mean over seeds, a band of one standard deviation, and a ring at the training T."""
    timesteps = list(numbers.study.test_timesteps)
    for entry in numbers.entries:
        points = [numbers.spread(entry, at(t)) for t in timesteps]
        means = np.array([point.mean for point in points])
        stds = np.nan_to_num([point.std for point in points])
        axis.plot(timesteps, means, marker="o", markersize=3.5, label=entry, **styles[entry])
        low, high = np.clip([means - stds, means + stds], 0, 100)
        colour = styles[entry]["color"]
        axis.fill_between(timesteps, low, high, color=colour, alpha=0.12, lw=0)
        trained = numbers.timesteps(entry)
        if trained in timesteps:
            axis.plot(
                trained,
                means[timesteps.index(trained)],
                "o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=colour,
            )
    axis.set_xticks(timesteps)
    axis.set_xlabel("test T (ring: training T)")
    finish(axis, "Accuracy at every T", ACCURACY, legend=False)


def _loss(axis: Any, numbers: Numbers, styles: dict[str, dict[str, Any]]) -> None:
    entries = numbers.entries
    for i, entry in enumerate(entries):
        curves = [result.curve for result in numbers.of(entry)]
        shortest = min(map(len, curves))
        losses = np.array([[loss for _, loss, _ in curve[:shortest]] for curve in curves])
        before = numbers.epochs_before(entry)
        epochs = [before + epoch for epoch, _, _ in curves[0][:shortest]]
        low, high, colour = losses.min(0), losses.max(0), styles[entry]["color"]
        if shortest == 1:  # points in one column would overlap, and a band would be a line
            epochs = [epochs[0] + 0.8 * ((i + 0.5) / len(entries) - 0.5)]
            axis.vlines(epochs, low, high, color=colour, alpha=0.3, lw=5)
        axis.plot(epochs, losses.mean(0), marker="o" if shortest == 1 else None, **styles[entry])
        axis.fill_between(epochs, low, high, color=colour, alpha=0.12, lw=0)
    # The loss falls fast at first; the differences of interest are at the end.
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    # With a single evaluation, the axis would show tenths of an epoch.
    start, end = axis.get_xlim()
    axis.set_xlim(widened(start, end, 2.0, (0.0, math.inf)))
    axis.xaxis.get_major_locator().set_params(integer=True)
    continued = any(map(numbers.epochs_before, numbers.entries))
    single = all(len(result.curve) == 1 for entry in entries for result in numbers.of(entry))
    meaning = "including those of init; band" if continued else "band"
    axis.set_xlabel(f"epoch ({'side by side; bar' if single else meaning}: range over seeds)")
    held_out = all(run.config.data.held_out for run in numbers.runs)
    title = f"Loss on {'held-out samples' if held_out else 'the validation split'}"
    finish(axis, title, "cross-entropy of the time-mean", legend=False)


def _early_exit(axis: Any, numbers: Numbers, styles: dict[str, dict[str, Any]]) -> None:
    """Plot accuracy by the average timesteps a sample, means over seeds at each threshold.

    Curves go from all samples decided at T=1 to all decided at the last T; a diamond marks the
    thresholds that the runs chose.
    """
    most = max(numbers.study.test_timesteps)
    for entry in numbers.entries:
        curves = [
            exit_curve(result.by_timestep, result.early_exit, most) for result in numbers.of(entry)
        ]
        spent, top1 = np.mean(curves, axis=0).T
        axis.plot(spent, top1, marker="o", markersize=3.5, **styles[entry])
        chosen = [[exit_timesteps(one), exit_top1(one)] for one in numbers.of(entry)]
        style = styles[entry] | {"linestyle": "none"}
        axis.plot(*np.mean(chosen, axis=0), marker="D", markersize=9, **style)
    axis.set_xlabel("average timesteps a sample (diamond: chosen threshold)")
    finish(axis, "Early exit", ACCURACY, legend=False)


def _differences(
    axis: Any, numbers: Numbers, compared: list[str], styles: dict[str, dict[str, Any]]
) -> None:
    for row, entry in enumerate(reversed(compared)):
        difference = numbers.difference(entry, last)
        half = None if math.isnan(difference.low) else difference.high - difference.mean
        colour = styles[entry]["color"]
        axis.errorbar(difference.mean, row, xerr=half, fmt="o", color=colour, capsize=4)
    axis.axvline(0, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_yticks(
        range(len(compared)),
        [f"{entry}\n- {numbers.study.entries[entry].control}" for entry in reversed(compared)],
    )
    axis.set_ylim(-0.6, len(compared) - 0.4)
    low, high = axis.get_xlim()
    axis.set_xlim(widened(low, high, LEAST_DIFFERENCE, (-100.0, 100.0)))
    axis.set_xlabel("points of top-1, mean and 95 % CI")
    finish(axis, "Difference to the control, last epoch", "", legend=False)
