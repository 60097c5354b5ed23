"""Draw the figure at the top of the README from the project's results.

python docs/make/readme_figure.py
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"

# The same colours as in the figures of these results.
OURS, PEER, RELU, SAVING = "#0072B2", "#D55E00", "#767676", "#009E73"
TIMESTEPS = 4  # that are drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="docs/make/readme_figure.py", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--study",
        type=Path,
        metavar="JSON",
        default=DOCS / "results/early_exit_dvs128_objects.json",
    )
    add("--entries", nargs=2, metavar=("SDT", "TET"), default=["sdt", "tet"])
    add("--performance", type=Path, metavar="JSON", default=DOCS / "performance/results.json")
    add("--output", type=Path, metavar="PNG", default=DOCS / "overview.png")
    options = parser.parse_args(arguments)
    from tetdist.apps.reports.style import new_figure, save
    from tetdist.errors import UserError

    try:
        study, performance = read(options.study), read(options.performance)
        figure = new_figure(13, 3.7)
        axes = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.25))
        draw_losses(axes[0])
        draw_early_exit(axes[1], study, *options.entries)
        draw_cost(axes[2], performance)
        save(figure, options.output)
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


def read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=11, fontweight="bold")


# --- TET ------------------------------------------------------------------------------------------


def draw_losses(axis: Any) -> None:
    """Draw the network at each timestep, its outputs, and the outputs that a loss uses."""
    axis.set_axis_off()
    axis.set_xlim(-0.2, TIMESTEPS + 1.25)
    axis.set_ylim(-1.75, 3.35)
    title(axis, "Every timestep answers for itself")
    for t in range(TIMESTEPS):
        box(axis, t, 1.15, "spiking\nnetwork", RELU, 0.86, 0.9)
        box(axis, t, 2.55, f"O({t + 1})", OURS, 0.6, 0.55)
        arrow(axis, (t + 0.5, 1.62), (t + 0.5, 2.25), RELU)
        arrow(axis, (t + 0.5, 0.12), (t + 0.5, 0.68), RELU)
        axis.text(t + 0.5, -0.1, f"t = {t + 1}", ha="center", va="center", fontsize=8, color=RELU)
        if t:
            arrow(axis, (t - 0.07, 1.15), (t + 0.07, 1.15), RELU)
    axis.text(TIMESTEPS + 0.1, 1.15, "membranes\npersist", fontsize=8, va="center", color=RELU)
    axis.text(TIMESTEPS + 0.1, 2.55, "outputs", fontsize=8, va="center", color=RELU)
    bold = {"fontsize": 9.5, "va": "center", "fontweight": "bold"}
    axis.text(0, -0.75, "SDT:", color=PEER, **bold)
    axis.text(0.75, -0.75, r"$CE\,(\,mean_t\,O(t),\,y\,)$", va="center", fontsize=10)
    axis.text(0, -1.4, "TET:", color=OURS, **bold)
    pull = r"$(1-\lambda)\,mean_t\,CE\,(O(t),\,y)\,+\,\lambda\,mean\,(O-\phi)^2$"
    axis.text(0.75, -1.4, pull, va="center", fontsize=10)


def box(axis: Any, t: int, y: float, text: str, colour: str, width: float, height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (t + 0.5 - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.1"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, ec=colour, fc="white"))
    axis.text(t + 0.5, y, text, ha="center", va="center", fontsize=8, color=colour)


def arrow(axis: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    properties = {"arrowstyle": "->", "color": colour, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=end, xytext=start, arrowprops=properties)


# --- accuracy -------------------------------------------------------------------------------------


def draw_early_exit(axis: Any, study: dict[str, Any], sdt: str, tet: str) -> None:
    """Accuracy by the timesteps that a sample takes, of two entries of a study: means of the seeds.

    Each sample stops when the network is sure enough of it: a dot is a threshold, a diamond those
    that the runs chose. Dashed: all samples stop at the same timestep.
    """
    from tetdist.apps.studies.numbers import exit_curve

    seeds = 0
    timesteps = study["study"]["test_timesteps"]
    most = max(timesteps)
    for entry, colour, label in ((sdt, PEER, "SDT"), (tet, OURS, "TET")):
        runs = [run for run in study["runs"] if run["entry"] == entry]
        seeds = len(runs)
        accuracy = [run["by_timestep"] for run in runs]
        curves = [exit_curve(run["by_timestep"], run["early_exit"], most) for run in runs]
        at_once = mean([by_timestep[:most] for by_timestep in accuracy])
        axis.plot(range(1, most + 1), at_once, "--", color=colour, linewidth=1, alpha=0.7)
        spent, top1 = zip(*mean(curves), strict=True)
        axis.plot(spent, top1, "o-", color=colour, label=label, markersize=3.5)
        exits = [run["chosen_exit"] for run in runs]
        chosen = mean([[point["mean_timesteps"], point["top1"]] for point in exits])
        axis.plot(*chosen, "D", color=colour, markersize=8)
    axis.set_xlabel(
        f"timesteps of a sample on average, {seeds} seeds\n"
        "(diamonds: thresholds chosen; dashed: all stop at t)",
        fontsize=9,
    )
    data = study["study"]["title"].partition(" on ")[2]
    axis.set_ylabel(f"top-1 (%),\n{data}", fontsize=8)
    axis.set_xticks(timesteps)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    title(axis, "As many timesteps as a sample needs")


def mean(values: list[Any]) -> Any:
    """Return the mean over the first axis."""
    import numpy as np

    return np.mean(values, axis=0).tolist()


# --- cost -----------------------------------------------------------------------------------------

NAMES = {
    "spikingjelly, eager": ("spikingjelly 2.0 (eager)", PEER),
    "relu": ("ReLU network on T x batch", RELU),
    "tetdist, none": ("tetdist", OURS),
    "tetdist, blocks": ("tetdist, recompute: blocks", SAVING),
}


def draw_cost(axis: Any, performance: dict[str, Any]) -> None:
    """Time of a step and memory kept, both as multiples of the ReLU network's."""
    step, memory = performance["step-bf16"], performance["memory-bf16"]
    seconds, seconds_fp32 = (
        {row["name"]: row["ratio"] for row in performance[f"step-{precision}"]["rows"]}
        for precision in ("bf16", "fp32")
    )
    kept = {
        row["name"]: row["at_most_mib"]
        for row in memory["rows"]
        if row["timesteps"] == step["timesteps"]
    }
    groups = (
        ("time of a training\nstep, bf16", seconds),
        ("the same, fp32", seconds_fp32),
        ("memory kept for the\nbackward pass, bf16", kept),
    )
    names = [name for name in NAMES if name in seconds]
    for group, (_, values) in enumerate(groups):
        for i, name in enumerate(names):
            label, colour = NAMES[name]
            ratio = values[name] / values["relu"]
            y = group * (len(names) + 1) + i
            axis.barh(y, ratio, color=colour, label=None if group else label)
            size = f"  ({values[name]:.0f} MiB/image)" if values is kept else ""
            text = f"{ratio:.2f}{size}"
            # White background, since the line at 1 would cross it.
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axis.text(ratio + 0.03, y, text, va="center", fontsize=8, bbox=behind)
    # A group's label stands between its bars.
    middle = (len(names) - 1) / 2
    ticks = [middle + group * (len(names) + 1) for group in range(len(groups))]
    axis.set_yticks(ticks, [text for text, _ in groups], fontsize=9)
    axis.axvline(1, color=RELU, linestyle=":", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlim(0, 3.6)
    what = f"{step['model']}, T={step['timesteps']}, on 2 CPU threads"
    axis.set_xlabel(f"multiple of the ReLU network's\n({what})", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    # No place beside the bars is free for all lengths of bars.
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    title(axis, "At the price of a ReLU network")


if __name__ == "__main__":
    sys.exit(main())
