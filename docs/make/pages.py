"""Parts that the scripts of result pages share."""

import argparse
import json
import logging
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports import style
from tetdist.apps.studies import plan
from tetdist.apps.studies.numbers import Difference, Numbers, Result, paired_difference
from tetdist.apps.studies.plan import StudyRun, StudySection
from tetdist.storage.files import parse_json, write_json
from tetdist.tracking.metrics_file import restored

ROOT = Path(__file__).resolve().parents[2]
RESULTS, STUDIES = ROOT / "docs/results", ROOT / "configs/studies"
ABOUT = re.compile(r"# (?P<title>.+)\n\n\*\*Question\.\*\* (?P<question>.+)\n")
ANSWER = re.compile(r"(?<=\n\*\*Answer\.\*\* ).+")


def no_flags(script: str | None) -> None:
    """Refuse flags, by the docstring of a script."""
    text = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=script, formatter_class=text).parse_args()


def runs_of(study: str) -> list[StudyRun]:
    """Return the trained runs of a study in runs/ of the working folder."""
    logging.basicConfig(level=logging.ERROR)
    # A relative path, so that the commands that pages show have no other.
    runs = plan.runs_of(plan.read(STUDIES / f"{study}.yaml"), Path("runs") / study, [])
    return [run for run in runs if plan.is_trained(run)]


def numbers_of(file: Path) -> Numbers:
    """Return the numbers of a study's report or page, also those of an earlier version."""
    return numbers_from(restored(parse_json(file.read_text())), file.stem)


def numbers_from(values: dict[str, Any], name: str) -> Numbers:
    """Return the numbers of a study by its name and the values of its report."""
    known = {key: one for key, one in values["study"].items() if key in StudySection.model_fields}
    study = StudySection.model_validate_json(json.dumps(known))
    results: dict[str, dict[int, Result]] = {name: {} for name in study.entries}
    names = [field.name for field in fields(Result)]
    for run in values["runs"]:
        kept = {name: run[name] for name in names if name in run}
        results[run["entry"]][run["seed"]] = Result(**kept)
    keys = values.get("configurations", {})
    command = values.get("command", f"python tools/study.py {name}")
    return Numbers(study, results, values.get("missing", []), keys, values["environments"], command)


def write(
    page: Path,
    answer: str,
    n: int | str,
    values: dict[str, Any],
    tables: list[str],
    figure: Any = None,
) -> None:
    """Write an answer and tables into a page, whose other text is written by hand.

    Beside it, write the figure, if any, and the numbers with what the summary of all pages names.

    Args:
        n: Number of seeds.
    """
    text = with_tables(with_answer(page.read_text(), answer), tables)
    about = ABOUT.match(text)
    assert about is not None
    known = {"study": about.groupdict(), "answer": answer, "n": n}
    write_json(page.with_suffix(".json"), known | values)
    if figure is not None:
        style.save(figure, page.with_suffix(".png"))
    page.write_text(text)
    print(text)


def with_answer(text: str, answer: str) -> str:
    return ANSWER.sub(lambda _: answer, text, count=1)


def with_tables(text: str, tables: list[str]) -> str:
    """Replace tables of a page: each is put in place of the next one with the same head.

    A list is replaced, too; its head is the first item's text before the colon.
    """
    begin = 0
    for table in tables:
        head = table.partition("\n")[0].partition(":")[0]
        pattern = re.compile(rf"{re.escape(head)}.*\n({re.escape(table[0])}.*\n)*")
        if (before := pattern.search(text, begin)) is None:
            raise SystemExit(f"error: the page has no table that begins with {head!r}; add one")
        text = f"{text[: before.start()]}{table}\n{text[before.end() :]}"
        begin = before.start() + len(table)
    return text


# --- early exit -----------------------------------------------------------------------------------


def exit_curve(one: Result, most: int) -> list[tuple[float, float]]:
    """Return (average timesteps a sample, top-1), from all decided at T=1 to all at the last T.

    Between them are the points of early exit, in ascending thresholds.
    """
    between = [(spent, top1) for _, top1, spent in one.early_exit]
    return [(1.0, one.by_timestep[0]), *between, (float(most), one.by_timestep[most - 1])]


def mean_exit_curve(results: list[Result], most: int) -> Any:
    """Return the mean of the results' `exit_curve`, (number of points, 2)."""
    return np.mean([exit_curve(one, most) for one in results], axis=0)


def timesteps_for(curve: list[tuple[float, float]], top1: float) -> float:
    """Return the timesteps at which an `exit_curve`, interpolated, first reaches an accuracy.

    NaN if it never does.
    """
    before = curve[0]
    for point in curve:
        if point[1] >= top1:
            weight = (top1 - before[1]) / (point[1] - before[1]) if before[1] < top1 else 0.0
            return before[0] + weight * (point[0] - before[0])
        before = point
    return math.nan


def spent_at_equal(
    numbers: Numbers, entry: str, control: str
) -> tuple[list[list[float]], list[list[float]]]:
    """Return each pair's timesteps with early exit, and with one t for all samples.

    The accuracy is that of the less accurate one of a pair at the last timestep, less the points
    that early exit may lose.
    """
    most, within = max(numbers.study.test_timesteps), numbers.study.exit_within or 0.0
    exits, fixed = list[list[float]](), list[list[float]]()
    for pair in numbers.pairs(entry, control):
        top1 = min(one.by_timestep[most - 1] for one in pair) - within
        exits.append([timesteps_for(exit_curve(one, most), top1) for one in pair])
        numbered = [enumerate(one.by_timestep, start=1) for one in pair]
        fixed.append([next(t for t, of_t in one if of_t >= top1) for one in numbered])
    return exits, fixed


def timesteps_at_equal(numbers: Numbers, entry: str, control: str) -> tuple[Difference, Difference]:
    """Return the differences of `spent_at_equal`: with early exit, and with one t for all."""
    first, second = (
        paired_difference(*([pair[i] for pair in pairs] for i in (0, 1)))
        for pairs in spent_at_equal(numbers, entry, control)
    )
    return first, second
