"""Draw the figure at the top of the README from the project's results.

python docs/make/readme_figure.py
"""

import sys
from typing import Any

import losses
import numpy as np
import pages

from tetdist.apps.reports import style
from tetdist.storage.files import parse_json
from tetdist.tracking.metrics_file import restored

DOCS = pages.ROOT / "docs"

# The same colours as in the figures of these results.
OURS, PEER, RELU, SAVING = "#0072B2", "#D55E00", "#767676", "#009E73"
DENSE = "#8FB9D6"
# The page is also read at 400 pixels, half the figure's width.
FONT = 15


def main() -> int:
    pages.no_flags(__doc__)
    page = restored(parse_json((pages.RESULTS / "losses.json").read_text()))
    performance = parse_json((DOCS / "performance/results.json").read_text())
    skipping = parse_json((DOCS / "performance/zeros.json").read_text())
    figure = style.new_figure(7.6, 8.9)
    # Each panel has its own left margin.
    exits, costs = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    draw_early_exit(exits, page)
    draw_cost(costs, groups_of(skipping, performance))
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


def draw_early_exit(figure: Any, page: dict[str, Any]) -> None:
    """Draw the mean timesteps of TET and SDT at equal accuracy, in percent of T, by data set.

    Bold: the difference is significant after Holm's correction for the page's table.
    """
    axis = panel(figure, "Early exit: timesteps at equal accuracy")
    holm = {
        row["data"]: row["holm"]["exit"]
        for row in page["differences"]
        if (row["entry"], row["control"]) == ("tet", "sdt")
    }
    for row, (study, values) in enumerate(page["studies"].items()):
        numbers = pages.numbers_from(values, study)
        most = max(numbers.study.test_timesteps)
        tet, sdt = np.mean(pages.spent_at_equal(numbers, "tet", "sdt")[0], axis=0)
        axis.plot([100 * tet / most, 100 * sdt / most], [row, row], color=RELU, linewidth=2.5)
        for x, colour in ((sdt, PEER), (tet, OURS)):
            axis.plot(100 * x / most, row, "o", color=colour, markersize=11)
        weight = "bold" if holm[losses.STUDIES[study]] < 0.05 else "normal"
        beside(axis, row, (f"{tet:.1f}", f"{sdt:.1f}", f"of {most}"), weight)
    beside(axis, -1, ("TET", "usual loss", ""), "bold")
    axis.set_yticks(range(len(holm)), [losses.STUDIES[study] for study in page["studies"]])
    axis.set_ylim(len(holm) - 0.5, -0.5)
    axis.set_xlim(0, 75)
    axis.set_xticks([0, 25, 50, 75])
    axis.set_xlabel("mean timesteps, % of T", fontsize=FONT)
    axis.grid(axis="x", alpha=0.3)


def beside(axis: Any, row: float, texts: tuple[str, str, str], weight: str) -> None:
    """Write a row of the table at the right of the axis: TET, the usual loss, and T."""
    for text, edge, colour in zip(texts, (34, 130, 178), (OURS, PEER, "black"), strict=True):
        axis.annotate(
            text,
            (1, row),
            (edge, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
            fontsize=FONT,
            fontweight=weight,
        )


# --- cost -----------------------------------------------------------------------------------------

NAMES = {
    "spikingjelly, eager": ("spikingjelly", PEER),
    "relu": ("ReLU network", RELU),
    "tetdist, none": ("tetdist", OURS),
    "tetdist, blocks": ("tetdist, recompute", SAVING),
}
# Contestants of zeros.py, by group.
SKIPPING = {
    "step": {"peer": NAMES["spikingjelly, eager"], "relu": ("ReLU network, T times", RELU)},
    "eval": {"dense": ("tetdist, dense", DENSE), "relu": ("ReLU network, once", RELU)},
}


def skipping_row(record: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the trained Spiking-ResNet18 on one thread, at the T of its training."""
    names = ("spiking_resnet18", "sparsity_cifar10", 4, 8, 1)
    keys = ("network", "data", "timesteps", "batch", "threads")
    (row,) = (one for one in record["rows"] if tuple(one[key] for key in keys) == names)
    return dict(row)


def groups_of(skipping: dict[str, Any], performance: dict[str, Any]) -> dict[str, Any]:
    """Return bars by heading: (name, colour) and the value."""
    seconds = skipping_row(skipping)["seconds"]
    kept = {row["name"]: row["kept_mib"] for row in performance["sew_resnet34-bf16"]["rows"]}
    groups = {}
    for kind, heading, base in (
        ("step", "training step, fp32 (ReLU network: 1)", "relu"),
        ("eval", "evaluation, fp32 (tetdist, dense: 1)", "dense"),
    ):
        bars = {name: seconds[f"{kind} {key}"] for key, name in SKIPPING[kind].items()}
        bars[NAMES["tetdist, none"]] = seconds[kind]
        groups[heading] = {name: value / seconds[f"{kind} {base}"] for name, value in bars.items()}
    groups["memory, bf16 (ReLU network: 1)"] = {
        NAMES[name]: kept[name] / kept["relu"] for name in NAMES if name in kept
    }
    return groups


def draw_cost(figure: Any, groups: dict[str, Any]) -> None:
    """Draw time and memory as groups of bars."""
    axis = panel(figure, "Time and memory on a CPU")
    ticks, first = dict[float, str](), 0.0
    for heading, bars in groups.items():
        axis.text(0.02, first - 0.9, heading, va="center", fontsize=FONT, fontweight="bold")
        for (label, colour), ratio in bars.items():
            axis.barh(first, ratio, color=colour)
            axis.text(ratio + 0.04, first, f"{ratio:.2f}", va="center", fontsize=FONT)
            ticks[first] = label
            first += 1
        first += 1.6
    axis.set_yticks(list(ticks), ticks.values())
    axis.invert_yaxis()
    axis.set_ylim(axis.get_ylim()[0], -1.3)
    axis.set_xlim(0, 1.1 * max(ratio for bars in groups.values() for ratio in bars.values()) + 0.3)
    axis.set_xticks([])
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


if __name__ == "__main__":
    sys.exit(main())
