"""Draw the figure at the top of the README from the project's results.

python docs/make/readme_figure.py
"""

import sys
from typing import Any

import pages

from tetdist.apps.reports import style
from tetdist.apps.studies.numbers import Numbers, exit_timesteps, exit_top1
from tetdist.storage.files import parse_json
from tetdist.tracking.metrics_file import restored

DOCS = pages.ROOT / "docs"
STUDY = "losses_fashion"

# The same colours as in the figures of these results.
OURS, PEER, RELU, SAVING = "#0072B2", "#D55E00", "#767676", "#009E73"
# The page is also read at 400 pixels, half the figure's width.
FONT = 15


def main() -> int:
    pages.no_flags(__doc__)
    studies = restored(parse_json((pages.RESULTS / "losses.json").read_text()))["studies"]
    performance = parse_json((DOCS / "performance/results.json").read_text())
    figure = style.new_figure(7.6, 7.8)
    # Each panel has its own left margin.
    exits, costs = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    draw_early_exit(exits, pages.numbers_from(studies[STUDY], STUDY))
    draw_cost(costs, performance)
    style.save(figure, DOCS / "overview.png")
    return 0


def panel(figure: Any, title: str) -> Any:
    """Return the axis of a new panel, with the title at the left edge of the figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=FONT + 3, fontweight="bold")
    axis = figure.subplots()
    axis.tick_params(labelsize=FONT)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


# --- accuracy -------------------------------------------------------------------------------------


def draw_early_exit(figure: Any, numbers: Numbers) -> None:
    """Draw accuracy by the mean timesteps of a sample with early exit, for SDT and TET.

    Lines: means of the seeds at each threshold. Large points: the thresholds that the runs chose on
    held-out samples.
    """
    axis = panel(figure, "Early exit, Fashion-MNIST: TET is right sooner")
    most = max(numbers.study.test_timesteps)
    # Heights at which the texts cross neither line.
    for entry, colour, label, height in (("tet", OURS, "TET", 91), ("sdt", PEER, "usual loss", 80)):
        curve = pages.mean_exit_curve(numbers.of(entry), most)
        axis.plot(*curve.T, color=colour, linewidth=2.5)
        x, y = (numbers.spread(entry, of).mean for of in (exit_timesteps, exit_top1))
        axis.plot(x, y, "o", color=colour, markersize=11)
        text = f"{label}: {y:.1f} % after {x:.2f} timesteps"
        axis.text(most, height, text, ha="right", color=colour, fontsize=FONT, fontweight="bold")
    axis.set_ylim(None, 93)
    axis.set_yticks((75, 80, 85, 90))
    axis.set_xticks(range(1, most + 1))
    axis.set_ylabel("top-1, %", fontsize=FONT)
    axis.set_xlabel(f"mean timesteps per sample, of {most}", fontsize=FONT)
    axis.grid(alpha=0.3)


# --- cost -----------------------------------------------------------------------------------------

NAMES = {
    "spikingjelly, eager": ("spikingjelly", PEER),
    "relu": ("ReLU network", RELU),
    "tetdist, none": ("tetdist", OURS),
    "tetdist, blocks": ("tetdist, recompute", SAVING),
}


def draw_cost(figure: Any, performance: dict[str, Any]) -> None:
    """Draw the time of a step and the memory that it keeps, as multiples of the ReLU network's."""
    axis = panel(figure, "Training: about ReLU's time, less memory")
    rows = performance["sew_resnet34-bf16"]["rows"]
    seconds, kept = ({row["name"]: row[key] for row in rows} for key in ("ratio", "kept_mib"))
    names = [name for name in NAMES if name in seconds]
    ticks = []
    for group, (heading, values) in enumerate(
        (("time of a step", seconds), ("activation memory", kept))
    ):
        first = group * (len(names) + 1.6)
        axis.text(0.02, first - 0.9, heading, va="center", fontsize=FONT, fontweight="bold")
        for i, name in enumerate(names):
            ratio = values[name] / values["relu"]
            axis.barh(first + i, ratio, color=NAMES[name][1])
            axis.text(ratio + 0.04, first + i, f"{ratio:.2f}", va="center", fontsize=FONT)
            ticks.append(first + i)
    axis.set_yticks(ticks, 2 * [NAMES[name][0] for name in names])
    axis.invert_yaxis()
    axis.set_ylim(axis.get_ylim()[0], -1.3)
    axis.set_xlim(0, 2.7)
    axis.set_xticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


if __name__ == "__main__":
    sys.exit(main())
