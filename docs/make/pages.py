"""Parts that the scripts of result pages share."""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tetdist.apps.reports import style
from tetdist.apps.studies import plan
from tetdist.apps.studies.numbers import Numbers, Result
from tetdist.apps.studies.plan import StudyRun, StudySection
from tetdist.storage.files import parse_json, write_json
from tetdist.tracking.metrics_file import restored

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
HEAD = """# {title}

**Question.** {question}

**Answer.** {answer}

"""


def no_flags(script: str | None) -> None:
    """Refuse flags, by the docstring of a script."""
    text = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=script, formatter_class=text).parse_args()


def runs_of(study: str) -> list[StudyRun]:
    """Return the trained runs of a study in runs/."""
    logging.basicConfig(level=logging.ERROR)
    runs = plan.runs_of(plan.read(plan.find(study)), ROOT / "runs" / study, [])
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
    about: dict[str, str],
    answer: str,
    n: int | str,
    found: dict[str, Any],
    text: str,
    figure: Any = None,
) -> None:
    """Write a page, its numbers with what the summary of all pages names, and its figure.

    Args:
        about: Title and question.
        n: Number of seeds.
    """
    write_json(page.with_suffix(".json"), {"study": about, "answer": answer, "n": n, **found})
    if figure is not None:
        style.save(figure, page.with_suffix(".png"))
    page.write_text(HEAD.format(**about, answer=answer) + text)
    print(page.read_text())


# --- early exit -----------------------------------------------------------------------------------


def exit_curve(
    by_timestep: Sequence[float], points: Iterable[Sequence[float]], most: int
) -> list[tuple[float, float]]:
    """Return (average timesteps a sample, top-1), from all decided at T=1 to all at the last T.

    Between them are the points (threshold, top-1, timesteps) of early exit, in ascending
    thresholds.
    """
    between = [(spent, top1) for _, top1, spent in points]
    return [(1.0, by_timestep[0]), *between, (float(most), by_timestep[most - 1])]


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


def timesteps_at_equal(
    pair: tuple[Result, Result], most: int, within: float
) -> list[Sequence[float]]:
    """Return the timesteps of both results with early exit, and with one t for all samples.

    Their accuracy is that of the less accurate one at the last timestep, less ``within``.
    """
    top1 = min(one.by_timestep[most - 1] for one in pair) - within
    curves = [exit_curve(one.by_timestep, one.early_exit, most) for one in pair]
    numbered = [enumerate(one.by_timestep, start=1) for one in pair]
    first = [next(t for t, of_t in one if of_t >= top1) for one in numbered]
    return [[timesteps_for(curve, top1) for curve in curves], first]
