"""Makes docs/results/losses.md, .json and .png: SDT, TET and TET of running means.

    python tools/study.py losses_fashion --jobs 2    # and so on, see STUDIES
    python docs/make/losses.py

It reads runs/ of the working folder; without it, the page is made anew from losses.json. Delete
RUN/calibration.json to repeat what it has measured of a run.
"""

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pages
import torch
from torch import Tensor

from tetdist.apps.reports import style
from tetdist.apps.studies import plan
from tetdist.apps.studies.numbers import (
    Difference,
    Numbers,
    Result,
    detectable,
    gather,
    holm,
    paired_difference,
    spread,
)
from tetdist.apps.studies.plan import StudyRun
from tetdist.apps.weights.trained import load
from tetdist.distributed.world import join
from tetdist.evaluation.evaluate import Evaluator
from tetdist.losses import running_means
from tetdist.storage.files import parse_json, write_json
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import restored, strict
from tetdist.training.setup import open_split

PAGE = pages.RESULTS / "losses.md"
# Study: data, and the earlier study whose SDT and TET have the same configuration.
STUDIES = {
    "losses_digits": ("digits", "early_exit_digits"),
    "losses_nmnist": ("N-MNIST", "early_exit_nmnist"),
    "losses_days": ("objects, another day", "across_days"),
    "losses_fashion": ("Fashion-MNIST", None),
}
SEARCH = "losses_fashion_lr"
# Beside them, not in the correction: earlier studies, their data, their SDT and TET, with three
# seeds and a `tet_of_means` without regulariser.
BESIDE = {
    "transformers_long": ("QKFormer, CIFAR-10, 10,000 images", "sdt", "tet"),
    "any_t_cifar10": ("CIFAR-10, 10,000 images", "sdt_t4", "tet_t4"),
    "any_t_nmnist": ("N-MNIST", "sdt_t10", "tet_t10"),
    "any_t_days": ("objects, another day", "sdt_t10", "tet_t10"),
}
ENTRIES = {"sdt": "SDT", "tet": "TET", "tet_of_means": "running means"}
PAIRS = (("tet_of_means", "sdt"), ("tet_of_means", "tet"), ("tet", "sdt"))
BINS = 15  # of confidence, equally wide, as usual
ABOUT = {
    "title": "SDT, TET, and TET of running means",
    "question": (
        "Does one loss give SDT's accuracy at T and TET's at T=1? SDT is the cross-entropy of the "
        "mean output over all T, TET the mean of every output's cross-entropy, and `tet_of_means` "
        "the mean over t of the cross-entropy of the mean up to t."
    ),
}
TEXT = """![Accuracy by mean timesteps with early exit](losses.png)

Lines are means over the seeds at each threshold of early exit; they begin with all samples decided
at T=1 and end with all at T.

## Differences

{differences}

Differences are paired by seed, with 95 % intervals of the paired t-test. *Exit* is the difference
of mean timesteps at equal accuracy: that of the less accurate one of a pair at T, less {within}
points, so fewer is better. *Loss* is the cross-entropy of the time-mean at T, on test data. Holm's
method corrects p for all {number} p values of this table; bold: significant after it. The number
after an interval is the minimum detectable effect (80 % power, without correction). In italics are
earlier studies of three seeds, in which `tet_of_means` has no regulariser; they are not in the
correction: [transformers_long](transformers_long.md) (30 epochs),
[any_t_cifar10](any_t_cifar10.md), [any_t_nmnist](any_t_nmnist.md), [any_t_days](any_t_days.md).

## Accuracy at every t, loss and calibration

{accuracy}

Mean ± standard deviation over n seeds: top-1 in percent of the mean output up to t, loss and
expected calibration error at T ({bins} bins of confidence, in points; only of runs whose networks
were at hand).

## Learning rates

{search}

## Origin

{origin}

Fashion-MNIST is trained for one epoch. Not run: N-MNIST with five seeds (losses_nmnist),
Fashion-MNIST as events, the search of learning rates, and one seed of the objects.

Commands: `python tools/study.py` with {commands}, then `python docs/make/losses.py`, which also
makes this page anew from [losses.json](losses.json). Machine: {machines}.
"""


# --- numbers --------------------------------------------------------------------------------------


def measured(study: str, earlier: str | None) -> dict[str, Any] | None:
    """Return the numbers of a study, with an earlier study's for entries that were not trained."""
    section = plan.read(plan.find(study))
    runs = plan.runs_of(section, Path("runs") / study, [])  # so that commands have no other path
    found = gather(section, [run for run in runs if plan.is_trained(run)], "")
    reused = []
    if earlier is not None:
        before = pages.numbers_of(pages.RESULTS / f"{earlier}.json")
        for entry in ("sdt", "tet"):
            again = found.results[entry]
            same = [before.results[entry][seed] for seed in again]
            equal = sum(one.by_timestep == again[one.seed].by_timestep for one in same)
            reused.append({"entry": entry, "study": earlier, "repeated": len(same), "equal": equal})
            found.results[entry] = before.results[entry]
    calibration = {
        run.name: calibration_error(run)
        for run in runs
        if run.seed in found.results[run.entry] and run.folder.exists() and plan.is_trained(run)
    }
    values = found.as_dict()
    kept = {key: values[key] for key in ("study", "runs", "environments")}
    return kept | {"reused": reused, "calibration": calibration} if values["runs"] else None


def earlier_numbers(study: str, data: str, sdt: str, tet: str) -> tuple[str, Numbers]:
    """Return the data of an earlier study, and its numbers by this page's names of losses."""
    found = pages.numbers_of(pages.RESULTS / f"{study}.json")
    names = dict(zip(ENTRIES, (sdt, tet, "tet_of_means"), strict=True))
    results = {name: found.results[entry] for name, entry in names.items()}
    return f"*{data}*", replace(found, results=results)


@torch.no_grad()
def calibration_error(run: StudyRun) -> float:
    """Return the expected calibration error at T on the validation split, in points."""
    file = run.folder / "calibration.json"
    if not file.exists():
        confidences, rights = list[Tensor](), list[Tensor]()

        def count(logits: Tensor, labels: Tensor) -> None:
            confidence, decided = running_means(logits)[-1].softmax(-1).max(-1)
            confidences.append(confidence.double())
            rights.append((decided == labels).double())

        with join("cpu") as world:
            model, split = load(run.folder).model, open_split(run.config, "val", world)
            Evaluator(model, run.config, split, world, lambda: None).run(run.name, also=count)
        confidence, right = torch.cat(confidences), torch.cat(rights)
        place = (confidence * BINS).ceil().long() - 1
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, confidence - right)
        write_json(file, {"ece": 100 * float(gaps.abs().sum()) / len(right)})
    return float(parse_json(file.read_text())["ece"])


def searched() -> dict[str, dict[str, float]]:
    """Return the held-out top-1 of each loss and learning rate."""
    found: dict[str, dict[str, float]] = {}
    for run in pages.runs_of(SEARCH):
        loss, rate = run.entry.rsplit("_", 1)
        found.setdefault(loss, {})[rate] = plan.lines(run, "val")[-1]["top1"]
    return found


# --- comparisons ----------------------------------------------------------------------------------


def compared(data: str, numbers: Numbers) -> list[dict[str, Any]]:
    """Return the differences of each pair of losses, by quantity."""
    rows = []
    for entry, control in PAIRS:
        pairs = numbers.pairs(entry, control)
        if len(pairs) < 2:
            continue
        most = pairs[0][0].timesteps
        values = {
            "T=1": [[one.by_timestep[0] for one in pair] for pair in pairs],
            "T": [[one.by_timestep[most - 1] for one in pair] for pair in pairs],
            "loss": [[one.loss for one in pair] for pair in pairs],
        }
        if (within := numbers.study.exit_within) is not None:
            spent = [pages.timesteps_at_equal(pair, most, within)[0] for pair in pairs]
            values["exit"] = [list(map(float, one)) for one in spent]
        differences = {
            key: vars(paired_difference(*(list(side) for side in zip(*found, strict=True))))
            for key, found in values.items()
        }
        rows.append({"data": data, "entry": entry, "control": control, **differences})
    return rows


SEARCHED = """

Top-1 of 6,000 held-out training images of Fashion-MNIST after the last epoch, with seed 0. The
other data sets have the rate of their recipe for all losses."""
QUANTITIES = ("T=1", "T", "exit", "loss")


def corrected(rows: list[dict[str, Any]]) -> int:
    """Add p after Holm's correction for all rows, and return the number of p values."""
    ones = [row[key] for row in rows for key in QUANTITIES if key in row]
    for one, p in zip(ones, holm([one["p"] for one in ones]), strict=True):
        one["holm"] = p
    return sum(not math.isnan(one["p"]) for one in ones)


def cell(one: dict[str, Any] | None, digits: int) -> str:
    if one is None:
        return ""
    if math.isnan(one["low"]):
        return f"{one['mean']:+.{digits}f} (no spread)"
    low, high = (f"{one[key]:+.{digits}f}" for key in ("low", "high"))
    found = Difference(**{key: one[key] for key in ("n", "mean", "low", "high", "p")})
    text = f"{one['mean']:+.{digits}f} [{low}, {high}]"
    text = f"**{text}**" if one.get("holm", 1.0) < 0.05 else text
    return f"{text}; {detectable(found):.{digits}f}"


def difference_table(rows: list[dict[str, Any]]) -> str:
    head = ["data", "losses", "n", "points at T=1", "points at T", "exit: timesteps", "loss"]
    table = []
    for row in rows:
        names = f"`{row['entry']}` - `{row['control']}`"
        cells = [cell(row.get(key), 3 if key == "loss" else 2) for key in QUANTITIES]
        table.append([row["data"], names, str(row["T"]["n"]), *cells])
    return markdown(head, table, numbers=True)


def accuracy_table(studies: dict[str, tuple[str, Numbers]], calibration: dict[str, Any]) -> str:
    shown = (1, 2, 3, 4, 6, 8, 10)
    rows = []
    for study, (data, numbers) in studies.items():
        for entry in (entry for entry in ENTRIES if numbers.results.get(entry)):
            results = numbers.of(entry)
            most = results[0].timesteps
            row = [f"{data}, `{entry}`", str(len(results))]
            row += [
                str(spread([one.by_timestep[t - 1] for one in results])) if t <= most else ""
                for t in shown
            ]
            losses = [one.loss for one in results]
            row.append(f"{mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}")
            errors = [calibration.get(study, {}).get(one.name) for one in results]
            known = [one for one in errors if one is not None]
            rows.append([*row, str(spread(known)) if len(known) == len(results) else ""])
    head = ["data, loss", "n", *(f"t={t}" for t in shown), "loss at T", "calibration error"]
    return markdown(head, rows, numbers=True)


def search_table(found: dict[str, dict[str, float]]) -> str:
    if not found:
        return "All losses have the learning rate of their recipe. No search was made."
    rates = sorted({rate for one in found.values() for rate in one}, key=float)
    rows = []
    for loss, one in found.items():
        best = max(one, key=one.__getitem__)
        cells = {rate: f"{one[rate]:.2f}" for rate in rates if rate in one}
        cells[best] = f"**{cells[best]}**"
        rows.append([f"`{loss}`", *(cells.get(rate, "") for rate in rates)])
    return markdown(["loss", *rates], rows, numbers=True) + SEARCHED


def draw(studies: dict[str, tuple[str, Numbers]]) -> Any:
    figure = style.new_figure(3.9 * len(studies), 4.4)
    axes = np.atleast_1d(figure.subplots(1, len(studies)))
    for axis, (data, numbers) in zip(axes, studies.values(), strict=True):
        for colour, (entry, label) in zip(style.SERIES, ENTRIES.items(), strict=False):
            results: list[Result] = numbers.of(entry)
            curves = [
                pages.exit_curve(one.by_timestep, one.early_exit, one.timesteps) for one in results
            ]
            if curves:
                points = np.mean(curves, axis=0).T
                axis.plot(*points, "o-", ms=3.5, color=colour, label=label)
        axis.set_xlabel("mean timesteps of a sample")
        style.finish(axis, data, style.ACCURACY, legend=False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# --- answer ---------------------------------------------------------------------------------------


def answer_of(rows: list[dict[str, Any]]) -> str:
    """Word what the running means gain and lose, by the corrected p."""

    def of(control: str, key: str) -> str:
        ones = [row[key] for row in rows if (row["entry"], row["control"]) == (OWN, control)]
        each = ", ".join(cell(one, 2).replace("*", "").partition(";")[0] for one in ones)
        ahead, behind = (
            sum(one["holm"] < 0.05 and sign * one["mean"] > 0 for one in ones) for sign in (1, -1)
        )
        return f"{each} (ahead in {ahead}, behind in {behind} of {len(ones)})"

    data = ", ".join(dict.fromkeys(row["data"] for row in rows if row["entry"] == OWN))
    return (
        f"Points of `tet_of_means` minus SDT, on {data}: {of('sdt', 'T')} at T and "
        f"{of('sdt', 'T=1')} at T=1; minus TET {of('tet', 'T')} at T and {of('tet', 'T=1')} at "
        "T=1. In brackets: in how many it is ahead and behind after Holm's correction."
    )


OWN = "tet_of_means"


def origin(found: dict[str, Any]) -> str:
    lines = []
    for study, values in found["studies"].items():
        for one in values["reused"]:
            text = f"{STUDIES[study][0]}: `{one['entry']}` is that of [{one['study']}]"
            text += f"({one['study']}.md), which has the same configuration"
            if one["repeated"]:
                text += f"; of {one['repeated']} repeated here, {one['equal']} had equal accuracies"
            lines.append(f"* {text}.")
    return "\n".join(lines)


def page_of(found: dict[str, Any]) -> tuple[str, str, str, Any]:
    """Return answer, number of seeds, text and figure of the page, by the numbers of the studies.

    The differences are added to them.
    """
    studies = {
        study: (STUDIES[study][0], pages.numbers_from(values, study))
        for study, values in found["studies"].items()
    }
    rows = [row for data, numbers in studies.values() for row in compared(data, numbers)]
    found["differences"] = rows
    number = corrected(rows)
    beside = {study: earlier_numbers(study, *names) for study, names in BESIDE.items()}
    more = [row for data, numbers in beside.values() for row in compared(data, numbers)]
    machines = {
        f"{one['cpu']}, {one['usable_cores']} cores, torch {one['packages']['torch']}"
        for values in found["studies"].values()
        for one in values["environments"]
    }
    text = TEXT.format(
        differences=difference_table([*rows, *more]),
        accuracy=accuracy_table(
            {**studies, **beside},
            {study: values["calibration"] for study, values in found["studies"].items()},
        ),
        search=search_table(found["search"]),
        origin=origin(found),
        number=number,
        within=next(iter(studies.values()))[1].study.exit_within,
        bins=BINS,
        commands=", ".join([*found["studies"], *([SEARCH] if found["search"] else [])]),
        machines="; ".join(sorted(machines)),
    )
    seeds = " to ".join(map(str, sorted({row["T"]["n"] for row in rows})))
    return answer_of(rows), seeds, text, draw(studies)


def main() -> int:
    pages.no_flags(__doc__)
    logging.basicConfig(level=logging.ERROR)
    file: Path = PAGE.with_suffix(".json")
    stored = restored(parse_json(file.read_text())) if file.exists() else {}
    measured_now = {
        study: values
        for study, (_, earlier) in STUDIES.items()
        if Path("runs", study).exists() and (values := measured(study, earlier)) is not None
    }
    found: dict[str, Any] = {
        "studies": stored.get("studies", {}) | measured_now,
        "search": searched() or stored.get("search", {}),
    }
    answer, seeds, text, figure = page_of(found)
    pages.write(PAGE, ABOUT, answer, seeds, json.loads(json.dumps(strict(found))), text, figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
