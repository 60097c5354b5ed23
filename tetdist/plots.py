"""Pictures of a run, drawn from its metrics.jsonl."""

import itertools
import math
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.tracking import read_metrics

# Okabe and Ito's colours, told apart by most eyes; each means the same in every panel.
TRAIN = "#0072B2"
VALIDATION = "#D55E00"
RATE = "#009E73"
SPEED = "#7A5195"
WAIT = "#E69F00"
QUIET = "#767676"


def learning_curves(metrics_file: Path, out: Path) -> None:
    """Draws loss, accuracy, learning rate and throughput of a run into one PNG.

    Does nothing while nothing is measured. The picture is written aside and renamed, so whoever
    looks at it while it is replaced sees the old one or the new one.

    Args:
        metrics_file: The run's metrics.jsonl.
        out: The PNG; its folder is made.

    Raises:
        UserError: A line of the file is damaged, or matplotlib is not installed.
    """
    lines = read_metrics(metrics_file)
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    if not train and not val:
        return
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed: pip install 'tetdist[train]'") from error

    # The object interface: pyplot would keep every figure and look for a display.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(13, 7.6), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic("LLLAAA;TTRRSS")
    _loss(axes["L"], train, val)
    _accuracy(axes["A"], train, val)
    _timesteps(axes["T"], val)
    _learning_rate(axes["R"], train)
    _throughput(axes["S"], train)

    end = max(line["epoch"] for line in train + val)
    borders = _phase_borders(train, val)
    # Where the label of a border meets no curve.
    for panel, height in {"L": 0.98, "A": 0.35, "R": 0.98, "S": 0.4}.items():
        axis = axes[panel]
        axis.set_xlabel("epoch")
        axis.set_xlim(0, end * 1.02 if end > 0 else 1)
        for epoch, label in borders:
            axis.axvline(epoch, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axis.text(
                epoch,
                height,
                f" {label}",
                transform=axis.get_xaxis_transform(),
                fontsize=8,
                color=QUIET,
                rotation=90,
                rotation_mode="anchor",
                ha="right",
                va="bottom",
            )
    name = metrics_file.absolute().parent.name
    step = max(line["step"] for line in train + val)
    figure.suptitle(
        f"{name}   \N{EM DASH}   epoch {end:.4g}, step {step:,}", fontsize=13, fontweight="bold"
    )

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(out.name + ".tmp")
    figure.savefig(aside, format="png")
    aside.replace(out)


def _loss(axis: Any, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    _raw_and_smooth(axis, train, "loss", TRAIN, "training")
    _markers(axis, *_series(val, "loss"), VALIDATION, "validation")
    _finish(axis, "Loss", "loss")


def _accuracy(axis: Any, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    _raw_and_smooth(axis, train, "top1", TRAIN, "training")
    epochs, top1 = _series(val, "top1")
    _markers(axis, epochs, top1, VALIDATION, "validation")
    if top1:
        best = max(range(len(top1)), key=top1.__getitem__)
        axis.plot(
            epochs[best],
            top1[best],
            "*",
            color=VALIDATION,
            markeredgecolor="black",
            markersize=15,
            zorder=5,
            label=f"best: {top1[best]:.2f} % (epoch {epochs[best]:.4g})",
        )
    _finish(axis, "Top-1 accuracy", "top-1 (%)")


def _timesteps(axis: Any, val: list[dict[str, Any]]) -> None:
    title = "Accuracy by timestep"
    evaluated = [line for line in val if line.get("per_timestep_top1")]
    if evaluated:
        last = evaluated[-1]
        top1 = last["per_timestep_top1"]
        steps = range(1, len(top1) + 1)
        title += f", epoch {last['epoch']:.4g}"
        axis.plot(steps, top1, "o-", color=VALIDATION)
        # Every value where there is room for it, else the ends; below the line, as it rises.
        for step in steps if len(top1) <= 8 else (1, len(top1)):
            axis.annotate(
                f"{top1[step - 1]:.2f}",
                (step, top1[step - 1]),
                xytext=(10, -15),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=VALIDATION,
            )
        axis.set_xlim(0.5, len(top1) * 1.06 + 0.5)
        axis.margins(y=0.2)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("timesteps averaged")
    _finish(axis, title, "top-1 (%)", legend=False)


def _learning_rate(axis: Any, train: list[dict[str, Any]]) -> None:
    _markers(axis, *_series(train, "lr"), RATE, "learning rate")
    _finish(axis, "Learning rate", "learning rate", legend=False)
    peaks: dict[Any, float] = {}
    for line in train:
        peaks[line.get("phase")] = max(peaks.get(line.get("phase"), 0), line.get("lr", 0))
    if peaks and 0 < min(peaks.values()) < max(peaks.values()) / 30:
        # SGD at 0.1, then Adam at 1e-4: the second would be a line at zero.
        axis.set_yscale("log")
        axis.set_ylim(min(peaks.values()) * 1e-2, max(peaks.values()) * 2)
    else:
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:g}")


def _throughput(axis: Any, train: list[dict[str, Any]]) -> None:
    speeds = _series(train, "samples_per_s")[1]
    if speeds:
        _raw_and_smooth(axis, train, "samples_per_s", SPEED, f"median {_median(speeds):,.4g}")
        axis.set_ylim(0, max(speeds) * 1.1)
    epochs, waits = _series(train, "data_wait")
    if waits:
        right = axis.twinx()
        right.fill_between(epochs, waits, color=WAIT, alpha=0.5, linewidth=0)
        right.set_ylim(0, 100)
        right.set_ylabel("step time waiting for data (%)", color="#A56A00", fontsize=9)
        right.tick_params(labelsize=9, colors="#A56A00")
        right.spines[["top", "left"]].set_visible(False)
        right.spines["right"].set_color("#BBBBBB")
        # The lines above the area, and the area not hidden by the lines' background.
        axis.set_zorder(right.get_zorder() + 1)
        axis.patch.set_visible(False)
    _finish(axis, "Throughput", "samples per second")


def _finish(axis: Any, title: str, unit: str, *, legend: bool = True) -> None:
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
    elif legend:
        # Beside the title, where it covers no curve.
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


def _markers(axis: Any, epochs: list[float], values: list[float], colour: str, label: str) -> None:
    """Draws a line whose points show while they are few."""
    marker = "o-" if len(values) <= 30 else "-"
    axis.plot(epochs, values, marker, color=colour, markersize=4, label=label)


def _raw_and_smooth(
    axis: Any, train: list[dict[str, Any]], key: str, colour: str, label: str
) -> None:
    """Draws the values lightly and their running mean over them, each phase by itself."""
    half = len(train) // 60
    if half == 0:
        _markers(axis, *_series(train, key), colour, label)
        return
    axis.plot(*_series(train, key), color=colour, alpha=0.25, linewidth=0.8)
    for _, lines in itertools.groupby(train, key=lambda line: line.get("phase")):
        epochs, values = _series(list(lines), key)
        means = _running_mean(values, half)
        axis.plot(epochs, means, color=colour, linewidth=1.8, label=label)
        label = "_later phase"  # not in the legend


def _running_mean(values: list[float], half: int) -> list[float]:
    """Averages each value with up to `half` neighbours on either side."""
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for index in range(len(values)):
        first, end = max(0, index - half), min(len(values), index + half + 1)
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Returns the epochs and values of the lines that have a finite one."""
    pairs = [
        (line["epoch"], line[key])
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _phase_borders(
    train: list[dict[str, Any]], val: list[dict[str, Any]]
) -> list[tuple[float, str]]:
    """Returns the epoch at which each phase but the first begins, and what to call it."""
    timesteps = {line.get("phase"): line.get("timesteps") for line in val}
    borders = []
    for before, after in itertools.pairwise(train):
        phase = after.get("phase")
        if phase is not None and phase != before.get("phase"):
            label = f"phase {phase}"
            if timesteps.get(phase):
                label += f": T = {timesteps[phase]}"
            borders.append((before["epoch"], label))
    return borders
