"""The report of a study in Markdown."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports import style
from tetdist.apps.studies import figures, summary
from tetdist.apps.studies.numbers import (
    Numbers,
    at,
    best,
    distinct,
    exit_timesteps,
    exit_top1,
    gather,
    last,
    spread,
)
from tetdist.apps.studies.plan import (
    TEACHER_KEY,
    StudyRun,
    StudySection,
    as_text,
)
from tetdist.config.checks import effective
from tetdist.config.identity import flatten
from tetdist.errors import UserError, without_passwords
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import strict
from tetdist.wording import are, counted

# Keys that a study sets itself, or an entry by init and teacher.
OF_THE_RUN = ("name", "seed", "init_checkpoint", TEACHER_KEY)

# --- the report -----------------------------------------------------------------------------------


def write(study: StudySection, name: str, runs: list[StudyRun], file: Path, command: str) -> None:
    """Put the study's section, with figure and numbers beside it, into a Markdown file.

    A section that the study has there already is replaced, and so is the summary of all studies
    where the file has one; all else stays.

    Raises:
        UserError: No run is finished, or the file's section has no end.
    """
    numbers = gather(study, runs)
    if not numbers.entries:
        raise UserError(
            f"there is nothing to report: of {counted(len(runs), 'run')} none is finished and "
            "evaluated"
        )
    folder = file.with_suffix("")
    text = replaced(
        file.read_text() if file.is_file() else "",
        name,
        section(numbers, f"{folder.name}/{name}", command),
        file,
    )
    folder.mkdir(parents=True, exist_ok=True)
    style.save(figures.draw(numbers), folder / f"{name}.png")
    values = json.dumps(strict(numbers.as_dict()), indent=1, allow_nan=False)
    write_whole(folder / f"{name}.json", without_passwords(values) + "\n")
    write_whole(file, summary.refreshed(text, folder, file))


def replaced(text: str, name: str, section: str, file: Path) -> str:
    """The file's text with the study's section in the place of its earlier one, or at the end."""
    begin, end = f"<!-- study {name} -->\n", f"<!-- end of study {name} -->\n"
    whole = begin + section + end
    before, found, rest = text.partition(begin)
    if not found:
        return f"{text.rstrip()}\n\n{whole}" if text.strip() else whole
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(f"{file}: the section that begins with {begin.strip()} has no end; mend it")
    return before + whole + after


def write_whole(file: Path, text: str) -> None:
    from tetdist.storage.files import explaining, write_text

    with explaining(file):
        write_text(file, text)


def section(numbers: Numbers, link: str, command: str) -> str:
    """The section in Markdown; ``link`` and a suffix are the names of figure and numbers."""
    study = numbers.study
    parts = [f"## {study.title}", study.question.strip(), provenance(numbers, command)]
    parts.append(differs_unnamed(numbers))
    if numbers.missing:
        parts.append(
            f"**Not complete**: {len(numbers.missing)} of {counted(len(numbers.runs), 'run')} "
            f"{are(len(numbers.missing))} missing ({', '.join(numbers.missing)})."
        )
    verdicts = [verdict(numbers, entry) for entry in numbers.entries]
    parts.append("\n".join(text for text in verdicts if text))
    parts += [
        overview(numbers),
        early_exit(numbers),
        f"![{study.title}]({link}.png)",
        by_timestep(numbers),
    ]
    if any(study.entries[entry].control for entry in numbers.entries):
        parts.append(difference_by_timestep(numbers))
    parts += [what_differs(numbers), commands(numbers, f"{link}.json")]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(numbers: Numbers, command: str) -> str:
    results = [result for entry in numbers.entries for result in numbers.of(entry)]
    day = time.strftime("%d %B %Y", time.gmtime(max(result.ended for result in results)))
    machines = distinct([result.environment for result in results])
    described = "; ".join(dict.fromkeys(map(machine, machines)))
    commits = dict.fromkeys(f"{str(m['commit'])[:10]}" for m in machines if m.get("commit"))
    of = f", at commit {', '.join(commits)}" if commits else ""
    if any(m.get("dirty") for m in machines):
        of += ", not all without changes"
    return f"`{command}`\n\nFinished on {day.lstrip('0')}{of}, on {described}."


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


def differs_unnamed(numbers: Numbers) -> str:
    """List the keys that differ between entries though neither names them; empty without any.

    Each entry is compared with its control, or, where it has none, with the first entry. A key that
    the other has no use for is listed if its value comes with a kind of neuron.
    """
    configs = {run.entry: run.config for run in numbers.runs}
    listed = []
    for entry in numbers.entries:
        other = numbers.study.entries[entry].control or numbers.entries[0]
        named = [*OF_THE_RUN]
        for one in (entry, other):
            named += flatten(numbers.study.entries[one].overrides)
        theirs = effective(configs[other])
        of_kind = {f"model.neuron.{key}" for key in configs[entry].model.changed_by_kind}
        keys = [
            f"`{key}={as_text(value)}` ({as_text(theirs[key]) if key in theirs else 'none'})"
            for key, value in effective(configs[entry]).items()
            if (key in theirs or key in of_kind) and value != theirs.get(key)
            if not any(f"{key}.".startswith(f"{n}.") or n.startswith(f"{key}.") for n in named)
        ]
        if keys:
            listed.append(f"* `{entry}` against `{other}`: {', '.join(keys)}")
    if not listed:
        return ""
    lines = "\n".join(listed)
    return f"Entries differ in more than the keys that they name, here with both values:\n\n{lines}"


def verdict(numbers: Numbers, entry: str) -> str:
    """One line on an entry against its control; empty where it has none."""
    difference = numbers.difference(entry, last)
    if difference is None:
        return ""
    control = numbers.study.entries[entry].control
    if difference.n < 2:
        said = "one seed says nothing about chance"
    elif math.isnan(difference.low):
        said = "no spread between the seeds"
    elif difference.low > 0:
        said = f"**better** (p = {difference.p:.2g})"
    elif difference.high < 0:
        said = f"**worse** (p = {difference.p:.2g})"
    else:
        said = f"no difference can be told from chance (p = {difference.p:.2g})"
    return f"* `{entry}` against `{control}`: {difference} points, n = {difference.n}: {said}."


def overview(numbers: Numbers) -> str:
    rows = []
    # Where all hold samples out, the validation split is seen once, at the end.
    apart = all(run.is_judged_apart for run in numbers.runs)
    shown = (last,) if apart else (last, best)
    for entry in numbers.entries:
        results = numbers.of(entry)
        image_timesteps, seconds = numbers.cost(entry)
        against = [numbers.difference(entry, value) for value in shown]
        rows.append(
            [
                f"`{entry}`",
                str(numbers.timesteps(entry)),
                str(len(results)),
                *(str(spread(list(map(value, results)))) for value in shown),
                *("" if difference is None else str(difference) for difference in against),
                f"{np.mean([result.loss for result in results]):.4f}",
                f"{image_timesteps / 1e6:.3g}",
                f"{seconds:.0f}",
            ]
        )
    epochs = ["last", "best"][: len(shown)]
    head = ["", "T", "n", *(f"{one} epoch, %" for one in epochs)]
    head += [*(f"{one} - control" for one in epochs), "loss", "image-timesteps, millions"]
    head += ["training, s"]
    table = markdown(head, rows, numbers=True)
    first = numbers.of(numbers.entries[0])[0]
    split = f" of the split {first.data_split}" if first.data_split else ""
    flatters = (
        "The best epoch is chosen on the same samples, which flatters it. " if best in shown else ""
    )
    return (
        f"{table}\n\nTop-1 on {first.samples} validation samples{split}: mean ± standard "
        "deviation over n seeds. A difference is that of runs with the same seed, with "
        f"the 95 % interval of the paired t-test. {flatters}Image-timesteps and seconds are "
        "medians and include what a run began with, and its teacher's training; seconds are "
        "without evaluations and depend on what else the machine did."
    )


def early_exit(numbers: Numbers) -> str:
    """Return the table of early exit at the chosen thresholds; empty without any."""
    if numbers.study.exit_within is None:
        return ""
    rows = []
    for entry in numbers.entries:
        results = numbers.of(entry)
        thresholds = [(result.chosen_exit or {}).get("threshold") for result in results]
        chosen = [threshold for threshold in thresholds if threshold is not None]
        # An entry may have been trained with fewer timesteps than early exit is up to.
        full = at(max(numbers.study.test_timesteps))
        lost = [exit_top1(result) - full(result) for result in results]
        against = [numbers.difference(entry, value) for value in (exit_timesteps, exit_top1)]
        rows.append(
            [
                f"`{entry}`",
                f"{min(chosen):.3f} to {max(chosen):.3f}" if chosen else "none",
                str(spread(list(map(exit_timesteps, results)))),
                str(spread(list(map(exit_top1, results)))),
                str(spread(lost)),
                *("" if difference is None else str(difference) for difference in against),
            ]
        )
    head = ["", "confidence", "T on average", "top-1, %", "- at full T"]
    head += ["T on average - control", "top-1 - control"]
    held_out = numbers.of(numbers.entries[0])[0].chosen_exit or {}
    most = max(numbers.study.test_timesteps)
    fewer = [f"`{entry}`" for entry in numbers.entries if numbers.timesteps(entry) < most]
    beyond = (
        f"\n\nThe full T is {most}, more timesteps than in the training of {' and '.join(fewer)}."
        if fewer
        else ""
    )
    return (
        "Early exit: a sample is decided once the softmax of its time-mean reaches a confidence, "
        f"the lowest that costs at most {numbers.study.exit_within:g} points on the "
        f"{held_out['chosen_on']['samples']} training samples that a run holds out:\n\n"
        f"{markdown(head, rows, numbers=True)}{beyond}"
    )


def by_timestep(numbers: Numbers) -> str:
    rows = []
    for entry in numbers.entries:
        trained = numbers.timesteps(entry)
        cells = [
            f"**{numbers.at(entry, t)}**" if t == trained else str(numbers.at(entry, t))
            for t in numbers.study.test_timesteps
        ]
        rows.append([f"`{entry}`", *cells])
    head = ["tested at T =", *map(str, numbers.study.test_timesteps)]
    title = "Top-1, last epoch, at other T than trained for (bold: the T of training):"
    return f"{title}\n\n{markdown(head, rows, numbers=True)}"


def difference_by_timestep(numbers: Numbers) -> str:
    rows = []
    for entry in numbers.entries:
        found = [numbers.difference(entry, at(t)) for t in numbers.study.test_timesteps]
        if any(found):
            control = numbers.study.entries[entry].control
            rows.append([f"`{entry}` - `{control}`", *map(str, found)])
    if not rows:
        return ""
    head = ["tested at T =", *map(str, numbers.study.test_timesteps)]
    table = markdown(head, rows, numbers=True)
    return f"Difference to the control there, with its interval:\n\n{table}"


def what_differs(numbers: Numbers) -> str:
    """The keys that have an effect and are not the same in all entries."""
    entries = numbers.entries
    configs = {entry: numbers.of(entry)[0].run.config for entry in entries}
    flat = {entry: effective(config) for entry, config in configs.items()}
    for entry, config in configs.items():
        for i, phase in enumerate(config.phases):
            # A phase that some entries have none of differs in all its keys: the set ones will do.
            if any(len(other.phases) <= i for other in configs.values()):
                is_set = flatten(phase.model_dump(mode="json", exclude_unset=True), f"phases.{i}.")
                flat[entry] = {
                    key: value
                    for key, value in flat[entry].items()
                    if key in is_set or not key.startswith(f"phases.{i}.")
                }
    keys = [
        key for key in dict.fromkeys(k for e in entries for k in flat[e]) if key not in OF_THE_RUN
    ]
    differing = [key for key in keys if len({str(flat[entry].get(key)) for entry in entries}) > 1]
    sections = [numbers.study.entries[entry] for entry in entries]
    others = {
        head: names
        for head, names in (
            ("begins with", [section.init for section in sections]),
            ("learns from", [section.teacher for section in sections]),
        )
        if any(names)
    }
    if not differing and not others:
        return ""
    rows = [
        [f"`{entry}`", *(str(flat[entry].get(key, "")) for key in differing)] for entry in entries
    ]
    head = ["", *(f"`{key}`" for key in differing), *others]
    for names in others.values():
        for row, name in zip(rows, names, strict=True):
            row.append(f"`{name}`" if name else "")
    return f"What differs between them:\n\n{markdown(head, rows, numbers=True)}"


def commands(numbers: Numbers, link: str) -> str:
    runs = [numbers.of(entry)[0].run for entry in numbers.entries]
    listed = "\n".join(str(run.train_command) for run in runs)
    beyond = [run for run in runs if run.is_evaluated_again]
    tested = (
        "Accuracies that the training does not evaluate are of another command, for instance "
        f"`{beyond[0].eval_command}`.\n\n"
        if beyond
        else ""
    )
    return (
        '<details markdown="1"><summary>Commands</summary>\n\n'
        f"Of the first seed, {runs[0].seed}; those of all runs, and every number, are in "
        f"[{link.rpartition('/')[2]}]({link}).\n\n"
        f"```\n{listed}\n```\n\n{tested}</details>"
    )
