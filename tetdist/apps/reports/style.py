"""Colours and helpers that all figures share."""

import io
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from tetdist.errors import UserError, sentence
from tetdist.storage.files import explaining, replacing

# Okabe and Ito's colours, which most people can distinguish; each has one meaning in all panels.
TRAIN = "#0072B2"
VALIDATION = "#D55E00"
AVERAGE = "#CC79A7"
PUBLISHED = "#000000"
RATE = "#009E73"
SPEED = "#7A5195"
WAIT = "#E69F00"
QUIET = "#767676"
# Colours for any number of lines.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
ACCURACY = "top-1 (%)"  # label of every accuracy axis
# Minimum range of an axis, in points of accuracy: in a smaller one, noise looks like a cliff.
LEAST_ACCURACY = 5.0
LOWEST, HIGHEST = -0.6, 100.6  # with space for markers and numbers at 0 and 100 %
STRETCHES = 2_000  # of a curve of many points; more than a panel has pixels


def new_figure(width: float, height: float, *, dpi: int = 110) -> Any:
    """Return an empty matplotlib figure of this size in inches."""
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
    """Write a PNG atomically: readers see the old or the new one. Its folder is created."""
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, sync=False) as stream:
            stream.write(png(figure))


def finish(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
    """Set a panel's title, unit, grid and, if it has lines, legend; widen an accuracy axis to a
    minimum range of points."""
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
            0.5, 0.5, "no data yet", transform=axis.transAxes, ha="center", va="center", color=QUIET
        )
    if drawn and unit == ACCURACY:
        low, high = axis.get_ylim()
        lack = max(LEAST_ACCURACY - (high - low), 0) / 2
        # Widen it to both sides alike, unless one of them would be impossible.
        above = max(high + lack - max(high, HIGHEST), 0)
        below = max(min(low, LOWEST) - (low - lack), 0)
        axis.set_ylim(low - lack - above + below, high + lack - above + below)
    if drawn and legend:
        # Place the legend beside the title, where it covers no curve.
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


def markers(axis: Any, epochs: list[float], values: list[float], colour: str, label: str) -> None:
    """Draw a line, with markers if it has few points."""
    style, points = "o-" if len(values) <= 30 else "-", thinned(epochs, values)
    axis.plot(*points, style, color=colour, linewidth=1.8, markersize=4, label=label)


def raw_and_smooth(
    axis: Any, train: list[dict[str, Any]], key: str, colour: str, label: str
) -> None:
    """Draw the values as a thin line, and their running mean in each phase above it."""
    steady = steady_part(train)
    half = len(steady) // 60
    if half == 0:
        markers(axis, *series(steady, key), colour, label)
        return
    axis.plot(*thinned(*series(steady, key)), color=colour, alpha=0.25, linewidth=0.8)
    for _, lines in itertools.groupby(steady, key=lambda line: line.get("phase")):
        epochs, values = series(list(lines), key)
        means = thinned(epochs, _running_mean(values, half))
        axis.plot(*means, color=colour, linewidth=1.8, label=label)
        label = "_later phase"  # not in the legend


def steady_part(train: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of training, without those over less than half the usual number of steps.

    The line at the end of an epoch may average one or two steps only and be a meaningless peak.
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


def thinned(epochs: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Keep of many points the lowest and the highest of each stretch, which look the same."""
    width, places = len(values) // STRETCHES, range(len(values))
    if width < 3:
        return epochs, values
    kept = []
    for start in places[::width]:
        stretch = places[start : start + width]
        ends = (end(stretch, key=values.__getitem__) for end in (min, max))
        kept += sorted(set(ends))
    return [epochs[place] for place in kept], [values[place] for place in kept]


def series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of the lines with a finite value."""
    pairs = [
        (line["epoch"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]
