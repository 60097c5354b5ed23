"""Makes docs/results/losses.md, .json and .png: SDT, TET and TET of running means.

    python tools/study.py losses_fashion --jobs 2    # and so on, see STUDIES
    python docs/make/losses.py

Runs that are not in runs/ keep their numbers of losses.json. Delete RUN/calibration.json to repeat
what it has measured of a run.
"""

import logging
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pages
import torch
from torch import Tensor

from tetdist.apps.reports import style
from tetdist.apps.studies import numbers as of_study
from tetdist.apps.studies import plan
from tetdist.apps.studies.numbers import Difference, Numbers, detectable, gather, holm, spread
from tetdist.apps.studies.plan import StudyRun
from tetdist.apps.weights.trained import load
from tetdist.data.splits import open_split
from tetdist.distributed.world import join
from tetdist.evaluation.evaluate import Evaluator
from tetdist.losses import running_means
from tetdist.storage.files import parse_json, write_json
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import restored, strict

PAGE = pages.RESULTS / "losses.md"
# Study: its data.
STUDIES = {
    "losses_digits": "digits",
    "losses_nmnist": "N-MNIST",
    "losses_days": "objects, another day",
    "losses_fashion": "Fashion-MNIST",
    "losses_i2e": "Fashion-MNIST as events",
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
OWN = "tet_of_means"
ENTRIES = {"sdt": "SDT", "tet": "TET", OWN: "running means"}
PAIRS = ((OWN, "sdt"), (OWN, "tet"), ("tet", "sdt"))
QUANTITIES = {
    "T=1": "points at T=1",
    "T": "points at T",
    "exit": "exit: timesteps",
    "loss": "loss",
}
BINS = 15  # of confidence, equally wide, as usual
# --- numbers --------------------------------------------------------------------------------------


def measured(study: str, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a study: of its runs in runs/, and the stored ones of the others."""
    runs = pages.runs_of(study)
    values = gather(plan.read(pages.STUDIES / f"{study}.yaml"), runs, "").as_dict()
    by_name = {run["name"]: run for run in [*stored["runs"], *values["runs"]]}
    before = [one for one in stored["environments"] if one not in values["environments"]]
    errors = {run.name: calibration_error(run) for run in runs}
    return {
        "study": values["study"],
        "runs": [by_name[name] for name in sorted(by_name)],
        "environments": [*before, *values["environments"]],
        "calibration": stored["calibration"] | errors,
    }


def earlier_numbers(study: str, data: str, sdt: str, tet: str) -> tuple[str, Numbers]:
    """Return the data of an earlier study, and its numbers by this page's names of losses."""
    numbers = pages.numbers_of(pages.RESULTS / f"{study}.json")
    names = dict(zip(ENTRIES, (sdt, tet, OWN), strict=True))
    results = {name: numbers.results[entry] for name, entry in names.items()}
    return f"*{data}*", replace(numbers, results=results)


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
            model, split = load(run.folder).model, open_split(run.config.data, "val", world)
            Evaluator(model, run.config, split, world, lambda: None).run(run.name, also=count)
        confidence, right = torch.cat(confidences), torch.cat(rights)
        place = (confidence * BINS).ceil().long() - 1
        gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, confidence - right)
        write_json(file, {"ece": 100 * float(gaps.abs().sum()) / len(right)})
    return float(parse_json(file.read_text())["ece"])


# --- comparisons ----------------------------------------------------------------------------------


@dataclass
class Compared:
    """Differences of a pair of losses by quantity, and p after Holm's correction if corrected."""

    data: str
    entry: str
    control: str
    differences: dict[str, Difference]
    holm: dict[str, float] = field(default_factory=dict)

    def is_significant(self, key: str) -> bool:
        return self.holm.get(key, 1.0) < 0.05

    def cell(self, key: str) -> str:
        if (difference := self.differences.get(key)) is None:
            return ""
        digits = 3 if key == "loss" else 2
        low, high = (f"{value:+.{digits}f}" for value in (difference.low, difference.high))
        # Their spaces do not break, or else a narrow column has four lines a row.
        text = f"{difference.mean:+.{digits}f} [{low},&nbsp;{high}]"
        text = f"**{text}**" if self.is_significant(key) else text
        return f"{text};&nbsp;{detectable(difference):.{digits}f}"


def compared(data: str, numbers: Numbers) -> list[Compared]:
    """Return the differences of each pair of losses."""
    values = {"T=1": of_study.at(1), "T": of_study.last, "loss": of_study.loss}
    rows = []
    for entry, control in PAIRS:
        differences = {key: numbers.difference(entry, of, control) for key, of in values.items()}
        if numbers.of_exit:
            differences["exit"], _ = pages.timesteps_at_equal(numbers, entry, control)
        rows.append(Compared(data, entry, control, differences))
    return rows


def correct(rows: list[Compared]) -> None:
    """Correct p by Holm's method for all rows."""
    places = [(row, key) for row in rows for key in QUANTITIES if key in row.differences]
    ps = [row.differences[key].p for row, key in places]
    for (row, key), p in zip(places, holm(ps), strict=True):
        row.holm[key] = p


def difference_table(rows: list[Compared]) -> str:
    table = [
        [
            row.data,
            f"`{row.entry}` - `{row.control}`",
            str(row.differences["T"].n),
            *map(row.cell, QUANTITIES),
        ]
        for row in rows
    ]
    return markdown(["data", "losses", "n", *QUANTITIES.values()], table, numbers=True)


def accuracy_table(studies: dict[str, tuple[str, Numbers]], calibration: dict[str, Any]) -> str:
    shown = (1, 2, 3, 4, 6, 8, 10)
    rows = []
    for study, (data, numbers) in studies.items():
        for entry in ENTRIES:
            results = numbers.of(entry)
            row = [f"{data}, `{entry}`", str(len(results))]
            row += [
                str(numbers.spread(entry, of_study.at(t))) if t <= results[0].timesteps else ""
                for t in shown
            ]
            loss = numbers.spread(entry, of_study.loss)
            row.append(f"{loss.mean:.3f} ± {loss.std:.3f}")
            errors = calibration.get(study, {})
            known = [errors[one.name] for one in results if one.name in errors]
            row.append(str(spread(known)) if len(known) == len(results) else "")
            exits = [str(numbers.spread(entry, of)) for of in numbers.of_exit.values()]
            rows.append([*row, " at ".join(exits)])
    head = ["data, loss", "n", *(f"t={t}" for t in shown), "loss at T", "calibration error"]
    return markdown([*head, "early exit: top-1 at timesteps"], rows, numbers=True)


def searched() -> dict[str, dict[str, float]]:
    """Return the held-out top-1 of each loss and learning rate."""
    accuracies: dict[str, dict[str, float]] = {}
    for run in pages.runs_of(SEARCH):
        loss, rate = run.entry.rsplit("_", 1)
        accuracies.setdefault(loss, {})[rate] = plan.lines(run, "val")[-1]["top1"]
    return accuracies


def search_table(accuracies: dict[str, dict[str, float]]) -> str:
    rates = sorted({rate for one in accuracies.values() for rate in one}, key=float)
    rows = [
        [f"`{loss}`", *(f"{of_loss[rate]:.2f}" for rate in rates)]
        for loss, of_loss in accuracies.items()
    ]
    return markdown(["loss", *rates], rows, numbers=True)


def draw(studies: dict[str, tuple[str, Numbers]]) -> Any:
    figure = style.new_figure(11.7, 8.2)
    axes = list(figure.subplots(2, 3).flat)
    for axis, (data, numbers) in zip(axes, studies.values(), strict=False):
        for colour, (entry, label) in zip(style.SERIES, ENTRIES.items(), strict=False):
            results = numbers.of(entry)
            points = pages.mean_exit_curve(results, results[0].timesteps).T
            axis.plot(*points, "o-", ms=3.5, color=colour, label=label)
        axis.set_xlabel("mean timesteps of a sample")
        style.finish(axis, data, style.ACCURACY, legend=False)
    for axis in axes[len(studies) :]:
        axis.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# --- the page -------------------------------------------------------------------------------------


def answer_of(rows: list[Compared], chosen: dict[str, Difference]) -> tuple[str, str]:
    """Return the answer, and the data sets on which the running means are behind or ahead."""

    def significant(control: str, key: str, sign: int) -> list[str]:
        return [
            f"{row.data} ({row.differences[key]})"
            for row in rows
            if (row.entry, row.control) == (OWN, control)
            and row.is_significant(key)
            and sign * row.differences[key].mean > 0
        ]

    def missed(control: str, key: str) -> str:
        pairs = [row for row in rows if (row.entry, row.control) == (OWN, control)]
        effects = [detectable(row.differences[key]) for row in pairs]
        unit = " points" if key.startswith("T") else ""
        return f"none (minimum detectable effects: {min(effects):.2g} to {max(effects):.2g}{unit})"

    def on(control: str, key: str, sign: int) -> str:
        return str(len(significant(control, key, sign)) or missed(control, key))

    def where(control: str, key: str, sign: int) -> str:
        return "; ".join(significant(control, key, sign)) or missed(control, key)

    data = dict.fromkeys(row.data for row in rows)
    worse = [f"{name} ({one}, p = {one.p:.2g})" for name, one in chosen.items() if one.high < 0]
    answer = (
        f"Of {len(data)} data sets, `{OWN}` is significantly behind SDT at T on "
        f"{on('sdt', 'T', -1)}, behind TET at T=1 on {on('tet', 'T=1', -1)}, and ahead of SDT at "
        f"T=1 on {on('sdt', 'T=1', 1)}."
    )
    verdicts = {
        "behind SDT at T": where("sdt", "T", -1),
        "behind TET at T=1": where("tet", "T=1", -1),
        "ahead of SDT at T=1": where("sdt", "T=1", 1),
        "fewer timesteps than SDT with early exit, at equal accuracy": where("sdt", "exit", -1),
        "behind SDT with thresholds chosen on held-out samples (uncorrected)": "; ".join(worse),
        "higher loss at T than SDT": where("sdt", "loss", 1),
        "higher loss at T than TET": where("tet", "loss", 1),
        "lower loss at T than TET": where("tet", "loss", -1),
    }
    return answer, "\n".join(f"* {what}: {places or 'none'}" for what, places in verdicts.items())


def page_of(record: dict[str, Any]) -> tuple[str, str, list[str], Any]:
    """Return answer, number of seeds, tables and figure of the page, by the numbers of the studies.

    The differences are added to them.
    """
    studies = {
        study: (data, pages.numbers_from(record["studies"][study], study))
        for study, data in STUDIES.items()
    }
    rows = [row for data, numbers in studies.values() for row in compared(data, numbers)]
    correct(rows)
    record["differences"] = list(map(asdict, rows))
    beside = {study: earlier_numbers(study, *names) for study, names in BESIDE.items()}
    more = [row for data, numbers in beside.values() for row in compared(data, numbers)]
    exits = of_study.exit_top1
    chosen = {data: numbers.difference(OWN, exits, "sdt") for data, numbers in studies.values()}
    answer, listed = answer_of(rows, chosen)
    calibration = {study: values["calibration"] for study, values in record["studies"].items()}
    tables = [
        listed,
        difference_table([*rows, *more]),
        accuracy_table({**studies, **beside}, calibration),
        "\n".join(f"* {data}: {one}" for data, one in chosen.items()),
        search_table(record["search"]),
    ]
    seeds = " to ".join(map(str, sorted({row.differences["T"].n for row in rows})))
    return answer, seeds, tables, draw(studies)


def main() -> int:
    pages.no_flags(__doc__)
    logging.basicConfig(level=logging.ERROR)
    stored = restored(parse_json(PAGE.with_suffix(".json").read_text()))
    studies = {study: measured(study, stored["studies"][study]) for study in STUDIES}
    record = {"studies": studies, "search": searched() or stored["search"]}
    answer, seeds, tables, figure = page_of(record)
    pages.write(PAGE, answer, seeds, strict(record), tables, figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
