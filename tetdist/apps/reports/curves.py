"""Plots of a run: its metrics.jsonl and its inputs."""

import itertools
import math
import statistics
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.reports import style
from tetdist.tracking.metrics_file import lines_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Lines = list[dict[str, Any]]
# Firing rates in spikes per neuron per timestep. A layer below the first or above the second passes
# on no information.
DEAD, SATURATED = 0.001, 0.9
# The values of a line of training that are drawn.
TRAINING = ("step", "epoch", "phase", "loss", "top1", "lr", "samples_per_s", "data_wait")


class Metrics:
    """The lines of a metrics.jsonl that are drawn, each read once while the file grows."""

    def __init__(self, file: Path) -> None:
        self.file, self._end = file, 0
        self._kinds: dict[str, Lines] = {"train": [], "val": [], "val_ema": []}

    def read(self) -> tuple[Lines, Lines, Lines]:
        """Return the lines of training, of evaluations and of evaluations of an average."""
        for end, line in lines_of(self.file, self._end):
            self._end = end
            if line["kind"] == "train":
                self._kinds["train"].append({key: line[key] for key in TRAINING if key in line})
            elif line["kind"] in self._kinds:
                self._kinds[line["kind"]].append(line)
        train, val, ema = self._kinds.values()
        return train, val, ema


def learning_curves(metrics: Metrics, out: Path) -> None:
    """Draw loss, accuracy, learning rate and throughput of a run into one PNG.

    A moving average of the weights (EMA) has its own curves. Nothing is drawn without measurements.
    """
    train, val, ema = metrics.read()
    if not train and not val:
        return
    figure = style.new_figure(13, 7.6)
    axes = figure.subplot_mosaic("LLLAAA;TTRRSS")
    borders = _phase_borders(train, val)
    style.raw_and_smooth(axes["L"], train, "loss", style.TRAIN, "training")
    style.raw_and_smooth(axes["A"], train, "top1", style.TRAIN, "training")
    shown = ((val, style.VALIDATION, "validation"), (ema, style.AVERAGE, "EMA"))
    for lines, colour, label in shown:
        style.markers(axes["L"], *style.series(lines, "loss"), colour, label)
        # The space beside the title fits a legend with one long entry.
        _with_best(axes["A"], lines, colour, label, briefly=bool(ema))
    # TET averages cross-entropies of each timestep, which are never below that of the mean output.
    _published(axes["L"], val, "train_loss", style.TRAIN, "published, of the mean output")
    _published(axes["A"], val, "train_top1", style.TRAIN, "_training, dashed")
    _published(axes["A"], val, "top1", style.PUBLISHED, "published")
    style.finish(axes["L"], "Loss", "loss")
    has_published = "reference_top1" in (val or train)[-1]
    title = "Top-1" if ema or has_published else "Top-1 accuracy"
    style.finish(axes["A"], title, style.ACCURACY + "; dashed: published" * has_published)
    _timesteps(axes["T"], val)
    _learning_rate(axes["R"], train)
    _throughput(axes["S"], train, room=1.6 if borders else 1.1)

    end = max(line["epoch"] for line in train + val)
    # Heights at which a border's label covers no curve.
    for panel, height in {"L": 0.98, "A": 0.35, "R": 0.98, "S": 0.98}.items():
        axis = axes[panel]
        axis.set_xlabel("epoch")
        axis.set_xlim(0, end * 1.02 if end > 0 else 1)
        upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "bottom"}
        upright |= {"transform": axis.get_xaxis_transform(), "fontsize": 8, "color": style.QUIET}
        for epoch, label in borders:
            axis.axvline(epoch, color=style.QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axis.text(epoch, height, f" {label}", **upright)
    step = max(line["step"] for line in train + val)
    _head(figure, metrics, f"epoch {end:.4g}, step {step:,}")
    style.save(figure, out)


def _head(figure: Any, metrics: Metrics, text: str) -> None:
    name = metrics.file.absolute().parent.name
    figure.suptitle(f"{name}   \N{EM DASH}   {text}", fontsize=13, fontweight="bold")


def _published(axis: Any, val: Lines, measured: str, colour: str, label: str) -> None:
    epochs, values = style.series(val, f"reference_{measured}")
    if measured.startswith("train"):  # a mean over the last epoch belongs to its middle
        epochs = [epoch - 0.5 for epoch in epochs]
    line = "o--" if len(values) <= 30 else "--"  # one value alone has no line
    axis.plot(epochs, values, line, color=colour, linewidth=1, markersize=3, label=label)


def _with_best(axis: Any, evaluations: Lines, colour: str, label: str, *, briefly: bool) -> None:
    epochs, top1 = style.series(evaluations, "top1")
    style.markers(axis, epochs, top1, colour, label)
    if top1:
        epoch, best = max(zip(epochs, top1, strict=True), key=lambda point: point[1])
        named = f"{best:.2f} %" if briefly else f"best: {best:.2f} % (epoch {epoch:.4g})"
        star = {"markeredgecolor": "black", "markersize": 15, "zorder": 5}
        axis.plot(epoch, best, "*", color=colour, label=named, **star)


def _timesteps(axis: Any, val: Lines) -> None:
    title = "Accuracy by timestep"
    evaluated = [line for line in val if line.get("per_timestep_top1")]
    if evaluated:
        last = evaluated[-1]
        top1 = last["per_timestep_top1"]
        steps = range(1, len(top1) + 1)
        title += f", epoch {last['epoch']:.4g}"
        axis.plot(steps, top1, "o-", color=style.VALIDATION)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        # Label every value if there is space, else the first and the last one.
        for step in steps if len(top1) <= 8 else (1, len(top1)):
            place = (step, top1[step - 1])
            axis.annotate(f"{top1[step - 1]:.2f}", place, color=style.VALIDATION, **above)
        room = min(0.5 + 0.06 * len(top1), 0.95)  # for the labels, without showing T = 0
        axis.set_xlim(1 - room, len(top1) + room)
        axis.margins(y=0.2)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("timesteps averaged")
    style.finish(axis, title, style.ACCURACY, legend=False)


def _learning_rate(axis: Any, train: Lines) -> None:
    style.markers(axis, *style.series(train, "lr"), style.RATE, "learning rate")
    style.finish(axis, "Learning rate", "learning rate", legend=False)
    phases = itertools.groupby(train, key=lambda line: line.get("phase"))
    peaks = [max(line.get("lr", 0) for line in lines) for _, lines in phases]
    if peaks and 0 < min(peaks) < max(peaks) / 30:
        # On a linear scale, Adam at 1e-4 after SGD at 0.1 would look like zero.
        axis.set_yscale("log")
        axis.set_ylim(min(peaks) * 1e-2, max(peaks) * 2)
    else:
        axis.set_ylim(bottom=0)
        # 0.00005 beside 0.0001, not 5e-05.
        axis.yaxis.set_major_formatter(lambda rate, _: f"{Decimal(f'{rate:.6g}'):f}")


def _throughput(axis: Any, train: Lines, *, room: float) -> None:
    unit, brown = "samples per second", "#A56A00"
    speeds = style.series(train, "samples_per_s")[1]
    if speeds:
        unit += f", median {statistics.median_high(speeds):,.4g}"
        style.raw_and_smooth(axis, train, "samples_per_s", style.SPEED, "speed")
        axis.set_ylim(0, max(speeds) * room)
    epochs, waits = style.series(train, "data_wait")
    if waits:
        right = axis.twinx()
        right.fill_between(*style.thinned(epochs, waits), color=style.WAIT, alpha=0.5, linewidth=0)
        # A line without points creates the area's entry in the legend.
        area = {"color": style.WAIT, "alpha": 0.5, "linewidth": 7}
        axis.plot(math.nan, math.nan, label="data wait", **area)
        right.set_ylim(0, 100)
        right.set_ylabel("step time waiting for data (%)", color=brown, fontsize=9)
        right.tick_params(labelsize=9, colors=brown)
        right.spines[["top", "left"]].set_visible(False)
        right.spines["right"].set_color("#BBBBBB")
        # Draw the lines above the area, without a background that would hide it.
        axis.set_zorder(right.get_zorder() + 1)
        axis.patch.set_visible(False)
    style.finish(axis, "Throughput", unit)


def _phase_borders(train: Lines, val: Lines) -> list[tuple[float, str]]:
    """Return the epoch at which each phase except the first begins, and its label."""
    timesteps = {line.get("phase"): line.get("timesteps") for line in val}
    borders = []
    for before, after in itertools.pairwise(train):
        phase = after.get("phase")
        if phase is not None and phase != before.get("phase"):
            steps = f": T = {timesteps[phase]}" if timesteps.get(phase) else ""
            borders.append((before["epoch"], f"phase {phase}{steps}"))
    return borders


def firing_rates(metrics: Metrics, out: Path) -> None:
    """Draw a heat map of each layer's firing rate at each evaluation of a run, if there is one."""
    _, val, _ = metrics.read()
    if not val or not val[-1].get("firing_rate"):
        return
    epochs, rates_of_last = [line["epoch"] for line in val], val[-1]["firing_rate"]
    # Zero has no logarithm; a rate below the scale gets the colour of dead layers.
    rates = [
        [max(line["firing_rate"].get(layer, math.nan), 1e-12) for line in val]
        for layer in rates_of_last
    ]
    figure = style.new_figure(10, min(2.4 + 0.24 * len(rates), 24))
    axis = figure.subplots()
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    colours = {"under": style.VALIDATION, "over": "black", "bad": "white"}
    mesh = axis.pcolormesh(
        _edges(epochs),
        range(len(rates) + 1),
        rates,
        cmap=colormaps["viridis"].with_extremes(**colours),
        norm=LogNorm(DEAD, SATURATED),
    )
    axis.set_ylim(len(rates), 0)  # the first layer at the top
    labels = [f"{layer}   {100 * rate:.3g} %" for layer, rate in rates_of_last.items()]
    axis.set_yticks([row + 0.5 for row in range(len(rates))], labels=labels)
    axis.tick_params(axis="y", length=0, labelsize=8 if len(rates) <= 60 else 5)
    axis.tick_params(axis="x", labelsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_xlabel("epoch")
    if len(val) == 1:  # a single column has no width for automatic ticks
        axis.set_xticks(epochs, labels=[f"{epochs[0]:.4g}"])
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
    title = "Firing rate by layer: spikes per neuron per timestep; numbers: last evaluation"
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
    bar = figure.colorbar(mesh, ax=axis, extend="both", pad=0.02)
    ticks = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9]
    bar.set_ticks(ticks, labels=[f"{100 * tick:g} %" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title("black: saturated\norange: dead", fontsize=8, loc="right")
    mean = sum(rates_of_last.values()) / len(rates)
    _head(figure, metrics, f"epoch {epochs[-1]:.4g}, {100 * mean:.3g} % on average")
    style.save(figure, out)


def _edges(centres: list[float]) -> list[float]:
    """Return the borders of cells around ascending centres."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    before = centres[0] - middles[0] if middles else 0.5
    after = centres[-1] - middles[-1] if middles else 0.5
    return [centres[0] - abs(before), *middles, centres[-1] + after]


def inputs(rgb: "npt.NDArray[np.float64]", labels: Sequence[str], title: str, out: Path) -> None:
    """Draw a network's inputs in RGB, from 0 to 1, with the class names of the N samples.

    They are images (N, H, W, 3), or event frames over time (N, T, H, W, 3).
    """
    over_time = rgb.ndim == 5
    columns = rgb.shape[1] if over_time else min(8, len(rgb))
    rows = len(rgb) if over_time else math.ceil(len(rgb) / columns)
    figure = style.new_figure(1.35 * columns + 0.6, 1.5 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for sample, (one, label) in enumerate(zip(rgb, labels, strict=True)):
        frames = one if over_time else [one]
        for t, frame in enumerate(frames):
            axis = axes[sample, t] if over_time else axes.flat[sample]
            axis.imshow(frame, interpolation="nearest")
            name = f"{label}, t = 1" if over_time and t == 0 else f"t = {t + 1}"
            axis.set_title(name if over_time else label, fontsize=8, loc="left", pad=2)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    style.save(figure, out)
