"""Report of a study: a page in Markdown, and all numbers as JSON."""

import json
import math
import time
from pathlib import Path
from typing import Any

from tetdist.apps.studies.numbers import CONFIDENCE, Difference, Numbers, at, detectable, holm, last
from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import explaining, write_text
from tetdist.tables import aligned, markdown
from tetdist.tracking.metrics_file import strict
from tetdist.wording import are, counted

HEAD = ["", "T", "n", "top-1, %", "image-timesteps, millions", "training, s", "minus"]
HEAD += ["points [95 % CI]", "minimum detectable effect", "p", "p, Holm", "result in this study"]


def write(numbers: Numbers, file: Path) -> None:
    """Write a study's page, with its numbers beside it."""
    if not numbers.entries:
        raise UserError(
            f"nothing to report: none of {counted(len(numbers.missing), 'run')} is finished and "
            "evaluated; the same command without --report-only trains them"
        )
    values = json.dumps(strict(numbers.as_dict()), indent=1, allow_nan=False)
    with explaining(file):
        write_text(file.with_suffix(".json"), without_passwords(values) + "\n")
        write_text(file, page(numbers, file.stem))


def page(numbers: Numbers, name: str) -> str:
    """Return the page in Markdown; the numbers are beside it, by this name."""
    study = numbers.study
    parts = [f"# {study.title}", study.question.strip(), missing(numbers)]
    parts += [results(numbers), at_each_timestep(numbers), what_differs(numbers)]
    parts += [provenance(numbers, name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def missing(numbers: Numbers) -> str:
    """Return the sentence that names the runs without a result; empty if there are none."""
    number, study = len(numbers.missing), numbers.study
    runs = counted(len(study.seeds) * len(study.entries), "run")
    text = f"**Incomplete**: {number} of {runs} {are(number)} missing"
    return f"{text} ({', '.join(numbers.missing)})." if number else ""


def results(numbers: Numbers) -> str:
    """Return the section of the results, with the table of entries."""
    rows = _entries(numbers)
    first = numbers.of(numbers.entries[0])[0]
    split = f" of the split {first.data_split}" if first.data_split else ""
    table = markdown(rows[0], rows[1:], numbers=True)
    text = (
        f"## Results\n\n{table}\n\nTop-1 after the last epoch, at the T of training, on "
        f"{first.samples} validation samples{split}: mean ± standard deviation over n seeds. "
        "Image-timesteps (training images times T) and seconds are medians and include the "
        "training of init and teacher; seconds exclude evaluations and depend on the machine's "
        "other load."
    )
    if numbers.compared:
        text += (
            " Differences are between runs with the same seed, with the 95 % interval and p of the "
            "paired t-test. Holm's method corrects p for the "
            f"{counted(len(numbers.compared), 'comparison')} of this table and decides the result "
            "in this study. The minimum detectable effect is the true difference that so many "
            "seeds with this spread would show as significant with a probability of 80 %, without "
            "correction."
        )
    return text


def summary(numbers: Numbers) -> str:
    """Return accuracies and differences to the controls as a table for a terminal."""
    rows = _entries(numbers)
    shown = ("", "T", "n", "top-1, %", "minus", "points [95 % CI]", "result in this study")
    kept = [i for i, head in enumerate(rows[0]) if head in shown]
    table = aligned([[row[i].strip("`*") for i in kept] for row in rows])
    return "\n".join(filter(None, [table, missing(numbers).replace("*", "")]))


def _entries(numbers: Numbers) -> list[list[str]]:
    """Return the table of entries: accuracy, difference to the control with its test, cost."""
    differences = {entry: numbers.difference(entry, last) for entry in numbers.compared}
    corrected = dict(zip(differences, holm([x.p for x in differences.values()]), strict=True))
    rows = []
    for entry in numbers.entries:
        image_timesteps, seconds = numbers.cost(entry)
        row = [f"`{entry}`", str(numbers.of(entry)[0].timesteps), str(len(numbers.of(entry)))]
        row += [str(numbers.spread(entry, last)), f"{image_timesteps / 1e6:.3g}", f"{seconds:.0f}"]
        if (paired := differences.get(entry)) is not None:
            fewer = "" if paired.n == len(numbers.of(entry)) else f" (n = {paired.n})"
            row += [f"`{numbers.compared[entry]}`", f"{paired}{fewer}", _number(detectable(paired))]
            row += [_number(p, ".2g") for p in (paired.p, corrected[entry])]
            row += [verdict(paired, corrected[entry])]
        rows.append([*row, *[""] * (len(HEAD) - len(row))])
    width = len(HEAD) if differences else HEAD.index("minus")
    return [row[:width] for row in (HEAD, *rows)]


def verdict(difference: Difference, p: float) -> str:
    """Describe the result of a comparison, by its corrected p."""
    if difference.n == 1:
        return "no test (one seed)"
    if math.isnan(difference.low):
        return "no test (no spread)"
    if p >= 1 - CONFIDENCE:
        return "not significant"
    return "**better**" if difference.mean > 0 else "**worse**"


def at_each_timestep(numbers: Numbers) -> str:
    """Return the table of accuracies and differences at each T, and with early exit."""
    tested = {str(t): at(t) for t in numbers.study.test_timesteps}
    names = {"exit_top1": "exit: top-1", "exit_timesteps": "exit: T"}
    exits = {names[key]: value for key, value in numbers.of_exit.items()}
    columns = tested | exits
    rows = []
    for entry in numbers.entries:
        trained = str(numbers.of(entry)[0].timesteps)
        cells = {key: str(numbers.spread(entry, value)) for key, value in columns.items()}
        marked = [f"**{cell}**" if key == trained else cell for key, cell in cells.items()]
        rows.append([f"`{entry}`", *marked])
    for entry in numbers.compared:
        cells = {key: str(numbers.difference(entry, value)) for key, value in columns.items()}
        rows.append([f"`{entry}` - `{numbers.compared[entry]}`", *cells.values()])
    table = markdown(["tested at T =", *columns], rows, numbers=True)
    text = (
        f"## Accuracy at each T\n\nTop-1 after the last epoch (bold: the T of training):\n\n{table}"
    )
    if exits:
        first = numbers.of(numbers.entries[0])[0].chosen_exit or {}
        text += (
            "\n\nEarly exit: a sample is decided once the softmax of its time-mean reaches a "
            f"confidence, the lowest that loses at most {numbers.study.exit_within:g} points on "
            f"the {first['chosen_on']['samples']} training samples that a run holds out; T is the "
            "mean over samples."
        )
    return text


def what_differs(numbers: Numbers) -> str:
    """Return the table of keys that differ between entries, with a row for each key."""
    sections = [numbers.study.entries[entry] for entry in numbers.entries]
    rows = [["init", *(one.init or "" for one in sections)]]
    rows += [["teacher", *(one.teacher or "" for one in sections)]]
    for key in next(iter(numbers.configurations.values()), {}):
        values = [numbers.configurations[entry][key] for entry in numbers.entries]
        rows.append([f"`{key}`", *values])
    rows = [row for row in rows if any(row[1:])]
    if not rows:
        return ""
    head = ["", *(f"`{entry}`" for entry in numbers.entries)]
    return f"## Differences between the entries\n\n{markdown(head, rows, numbers=True)}"


def provenance(numbers: Numbers, name: str) -> str:
    results = [result for entry in numbers.entries for result in numbers.of(entry)]
    day = time.strftime("%d %B %Y", time.gmtime(max(result.ended for result in results)))
    machines = numbers.environments
    described = "; ".join(dict.fromkeys(map(machine, machines)))
    commits = dict.fromkeys(f"{str(m['commit'])[:10]}" for m in machines if m.get("commit"))
    of = f", at commit {', '.join(commits)}" if commits else ""
    if any(m.get("dirty") for m in machines):
        of += ", some with uncommitted changes"
    firsts = [numbers.of(entry)[0] for entry in numbers.entries]
    listed = "\n".join(command for first in firsts for command in first.commands)
    return (
        f"## Provenance\n\n`{numbers.command}`\n\nFinished on {day.lstrip('0')}{of}, on "
        f"{described}. [{name}.json]({name}.json) has every number, and the commands of all runs. "
        f"Those of the first seed, {firsts[0].seed}:\n\n```\n{listed}\n```"
    )


def machine(environment: dict[str, Any]) -> str:
    packages = environment.get("packages") or {}
    cores = int(environment.get("usable_cores") or 0)
    kept = [f"{name} {packages[name]}" for name in ("torch", "deepspeed") if name in packages]
    parts = [
        *(environment.get("gpus") or []),
        f"{environment.get('cpu') or 'unknown CPU'}, {counted(cores, 'core')}",
        f"Python {environment.get('python')}",
        *kept,
    ]
    return ", ".join(parts)


def _number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
