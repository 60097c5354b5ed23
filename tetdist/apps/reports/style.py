"""Colours and the parts that all pictures share."""

import io
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetdist.errors import UserError, sentence
from tetdist.storage.files import replacing

# Okabe and Ito's colours, told apart by most eyes; each means the same in every panel.
TRAIN = "#0072B2"
VALIDATION = "#D55E00"
AVERAGE = "#CC79A7"
PUBLISHED = "#000000"
RATE = "#009E73"
SPEED = "#7A5195"
WAIT = "#E69F00"
QUIET = "#767676"
# Colours for lines of which there may be many.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
ACCURACY = "top-1 (%)"  # the unit of every axis of accuracy
# An axis shows at least so many points of accuracy: over less, chance looks like a cliff.
LEAST_ACCURACY, LEAST_DIFFERENCE = 5.0, 1.0
_WITH_ROOM = (-0.6, 100.6)  # for the markers of 0 and 100 %, and numbers beside them
PERCENT, POSITIVE = (0.0, 100.0), (0.0, math.inf)  # limits of a mean and its spread


def new_figure(width: float, height: float, *, dpi: int = 110) -> Any:
    """An empty matplotlib figure of so many inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise UserError(sentence(error)) from error
    # The object interface: pyplot would keep every figure and look for a display.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def save(figure: Any, out: Path) -> None:
    """Write a PNG aside and rename it: whoever looks while it is replaced sees the old one or the
    new one. Its folder is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out, sync=False) as stream:
        stream.write(png(figure))


def finish(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
    """Give a panel its title, unit, grid and, where there are lines, legend; an axis of accuracy
    shows some points at least, however little there is between the values."""
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_ylabel(unit, fontsize=10)
    axis.grid(color="#E4E4E4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#BBBBBB")
    drawn = [line for line in axis.get_lines() if len(line.get_xdata())]
    if not drawn:
        axis.set_yticks([])
        axis.text(
            0.5, 0.5, "nothing yet", transform=axis.transAxes, ha="center", va="center", color=QUIET
        )
    if drawn and unit == ACCURACY:
        low, high = axis.get_ylim()
        axis.set_ylim(widened(low, high, LEAST_ACCURACY, _WITH_ROOM))
    if drawn and legend:
        # The legend stands beside the title, where it covers no curve.
        handles = [line for line in drawn if not line.get_label().startswith("_")]
        axis.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.01, 0.99),
            ncols=len(handles),
            frameon=False,
            fontsize=9,
            handlelength=1.4,
            columnspacing=1.2,
        )


def widened(
    low: float, high: float, least: float, within: tuple[float, float]
) -> tuple[float, float]:
    """Limits of an axis that are at least so far apart, about the same middle.

    Where that would pass the limits of the values, ``within``, it goes the other way, by as much.
    """
    lack = max(least - (high - low), 0) / 2
    below, above = low - lack, high + lack
    beyond = max(above - max(high, within[1]), 0) - max(min(low, within[0]) - below, 0)
    return below - beyond, above - beyond


def markers(axis: Any, epochs: list[float], values: list[float], colour: str, label: str) -> None:
    """Draw a line whose points show while they are few."""
    axis.plot(
        epochs, values, marker_style(values), color=colour, linewidth=1.8, markersize=4, label=label
    )


def marker_style(values: Sequence[float]) -> str:
    return "o-" if len(values) <= 30 else "-"


def raw_and_smooth(
    axis: Any, train: list[dict[str, Any]], key: str, colour: str, label: str
) -> None:
    """Draw the values lightly and their running mean over them, each phase by itself."""
    steady = steady_part(train)
    half = len(steady) // 60
    if half == 0:
        markers(axis, *series(steady, key), colour, label)
        return
    axis.plot(*series(steady, key), color=colour, alpha=0.25, linewidth=0.8)
    for _, lines in itertools.groupby(steady, key=lambda line: line.get("phase")):
        epochs, values = series(list(lines), key)
        means = _running_mean(values, half)
        axis.plot(epochs, means, color=colour, linewidth=1.8, label=label)
        label = "_later phase"  # not in the legend


def steady_part(train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of training without those over less than half as many steps as usual.

    The line at the end of an epoch may be the mean of a batch or two: a peak that means nothing.
    """
    steps = [0, *(line["step"] for line in train)]
    counts = [float(after - before) for before, after in itertools.pairwise(steps)]
    least = statistics.median_high(counts) / 2 if counts else 0
    return [line for line, count in zip(train, counts, strict=True) if count >= least]


def _running_mean(values: list[float], half: int) -> list[float]:
    """Average each value with up to `half` neighbours on either side."""
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        first, end = max(0, index - half), min(len(values), index + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The epochs and values of the lines that have a finite value."""
    pairs = [
        (line["epoch"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]
