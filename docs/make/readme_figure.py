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
# The page is also read at 400 pixels, half the figure's width.
FONT = 15


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="docs/make/readme_figure.py", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--study",
        type=Path,
        metavar="JSON",
        default=DOCS / "results/losses.json",
    )
    add("--entries", nargs=2, metavar=("SDT", "TET"), default=["sdt", "tet"])
    add("--performance", type=Path, metavar="JSON", default=DOCS / "performance/results.json")
    add("--output", type=Path, metavar="PNG", default=DOCS / "overview.png")
    options = parser.parse_args(arguments)
    from tetdist.apps.reports.style import new_figure, save
    from tetdist.errors import UserError

    try:
        study, performance = read(options.study), read(options.performance)
        study = study["studies"]["losses_fashion"]
        figure = new_figure(7.6, 7.8)
        # Each panel has its own left margin.
        exits, costs = figure.subfigures(2, 1, height_ratios=(1, 1.15))
        draw_early_exit(exits, study, *options.entries)
        draw_cost(costs, performance)
        save(figure, options.output)
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


def read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def panel(figure: Any, title: str) -> Any:
    """Return the axis of a new panel, with the title at the left edge of the figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=FONT + 3, fontweight="bold")
    axis = figure.subplots()
    axis.tick_params(labelsize=FONT)
    axis.spines[["top", "right"]].set_visible(False)
    return axis


# --- accuracy -------------------------------------------------------------------------------------


def draw_early_exit(figure: Any, study: dict[str, Any], sdt: str, tet: str) -> None:
    """Draw accuracy by the mean timesteps of a sample with early exit, for two entries of a study.

    Lines: means of the seeds at each threshold. Large points: the thresholds that the runs chose on
    held-out samples.
    """
    axis = panel(figure, "Early exit, Fashion-MNIST: TET is right sooner")
    most = max(study["study"]["test_timesteps"])
    # Heights at which the texts cross neither line.
    for entry, colour, label, height in ((tet, OURS, "TET", 91), (sdt, PEER, "usual loss", 80)):
        runs = [run for run in study["runs"] if run["entry"] == entry]
        curves = [
            # From all samples decided at T=1 to all at the last T.
            [(1, run["by_timestep"][0])]
            + [(spent, top1) for _, top1, spent in run["early_exit"]]
            + [(most, run["by_timestep"][most - 1])]
            for run in runs
        ]
        spent, top1 = zip(*mean(curves), strict=True)
        axis.plot(spent, top1, color=colour, linewidth=2.5)
        exits = [run["chosen_exit"] for run in runs]
        x, y = mean([[point["mean_timesteps"], point["top1"]] for point in exits])
        axis.plot(x, y, "o", color=colour, markersize=11)
        text = f"{label}: {y:.1f} % after {x:.2f} timesteps"
        axis.text(most, height, text, ha="right", color=colour, fontsize=FONT, fontweight="bold")
    axis.set_ylim(None, 93)
    axis.set_yticks((75, 80, 85, 90))
    axis.set_xticks(range(1, most + 1))
    axis.set_ylabel("top-1, %", fontsize=FONT)
    axis.set_xlabel(f"mean timesteps per sample, of {most}", fontsize=FONT)
    axis.grid(alpha=0.3)


def mean(values: list[Any]) -> Any:
    """Return the mean over the first axis."""
    import numpy as np

    return np.mean(values, axis=0).tolist()


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
