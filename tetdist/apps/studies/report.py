"""Report of a study in Markdown."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tetdist.apps.reports import style
from tetdist.apps.studies import figures, summary
from tetdist.apps.studies.numbers import (
    Numbers,
    Result,
    at,
    best,
    distinct,
    exit_timesteps,
    exit_top1,
    gather,
    last,
    loss,
)
from tetdist.apps.studies.plan import TEACHER_KEY, StudyRun, StudySection, as_text
from tetdist.config.checks import effective
from tetdist.config.identity import flatten
from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import explaining, write_text
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import strict
from tetdist.wording import are, counted

# Keys that a study sets itself, or that an entry's init and teacher set.
OF_THE_RUN = ("name", "seed", "init_checkpoint", TEACHER_KEY)

# --- the report -----------------------------------------------------------------------------------


def write(study: StudySection, runs: list[StudyRun], name: str, file: Path, command: str) -> None:
    """Write the study's section into a Markdown file, with figure and numbers beside the file.

    This replaces the study's earlier section and the summary of all studies, if the file has them;
    everything else stays.

    Raises:
        UserError: No run is finished, or a section of the file has no end.
    """
    numbers = gather(study, runs)
    if not numbers.entries:
        raise UserError(
            f"nothing to report: none of {counted(len(runs), 'run')} is finished and evaluated; "
            "the same command without --report-only trains them"
        )
    figure = figures.draw(numbers)
    put(name, file, lambda link: section(numbers, link, command), figure, numbers.as_dict())


def put(
    name: str, file: Path, section: Callable[[str], str], figure: Any, values: dict[str, Any]
) -> None:
    """Write a study's or search's section into a Markdown file, with figure and numbers beside it.

    ``section`` makes it, given the link to figure and numbers without suffix.

    Raises:
        UserError: A section of the file has no end.
    """
    folder = file.with_suffix("")
    whole = section(f"{folder.name}/{name}")
    text = replaced(file.read_text() if file.is_file() else "", name, whole, file)
    folder.mkdir(parents=True, exist_ok=True)
    style.save(figure, folder / f"{name}.png")
    numbers = json.dumps(strict(values), indent=1, allow_nan=False)
    with explaining(file):
        write_text(folder / f"{name}.json", without_passwords(numbers) + "\n")
        write_text(file, summary.refreshed(text, folder, file))


def replaced(text: str, name: str, section: str, file: Path) -> str:
    """Return the file's text with the study's section replaced, or added at the end."""
    begin, end = f"<!-- study {name} -->\n", f"<!-- end of study {name} -->\n"
    if begin not in text:
        return f"{text.rstrip()}\n\n{begin}{section}{end}".lstrip()
    return summary.between(text, begin, end, section, file)


def section(numbers: Numbers, link: str, command: str) -> str:
    """Return the section in Markdown; ``link`` is the path of figure and numbers without suffix."""
    study = numbers.study
    parts = [f"## {study.title}", study.question.strip(), provenance(numbers, command)]
    parts.append(differs_unnamed(numbers))
    if numbers.missing:
        parts.append(
            f"**Incomplete**: {len(numbers.missing)} of {counted(len(numbers.runs), 'run')} "
            f"{are(len(numbers.missing))} missing ({', '.join(numbers.missing)})."
        )
    verdicts = [verdict(numbers, entry) for entry in numbers.entries]
    parts += [
        "\n".join(text for text in verdicts if text),
        overview(numbers),
        early_exit(numbers),
        f"![{study.title}]({link}.png)",
        by_timestep(numbers),
        difference_by_timestep(numbers),
        what_differs(numbers),
        commands(numbers, f"{link}.json"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(numbers: Numbers, command: str) -> str:
    results = [result for entry in numbers.entries for result in numbers.of(entry)]
    day = time.strftime("%d %B %Y", time.gmtime(max(result.ended for result in results)))
    machines = distinct([result.environment for result in results])
    described = "; ".join(dict.fromkeys(map(machine, machines)))
    commits = dict.fromkeys(f"{str(m['commit'])[:10]}" for m in machines if m.get("commit"))
    of = f", at commit {', '.join(commits)}" if commits else ""
    if any(m.get("dirty") for m in machines):
        of += ", some with uncommitted changes"
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
    """List keys that differ between entries although neither sets them; empty without any.

    Each entry is compared with its control or, without one, with the first entry. A key that has no
    effect in the other entry is listed if a kind of neuron sets its value.
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
    return f"Entries also differ in keys that they do not set, here with both values:\n\n{lines}"


def verdict(numbers: Numbers, entry: str) -> str:
    """Return a line that compares an entry with its control; empty without one."""
    difference = numbers.difference(entry, last)
    control = numbers.study.entries[entry].control
    if difference.n == 0:
        return ""
    if difference.n == 1:
        result = "one seed, so no test is possible"
    elif math.isnan(difference.low):
        result = "no spread between the seeds, so no test is possible"
    elif difference.low > 0:
        result = f"**better** (p = {difference.p:.2g})"
    elif difference.high < 0:
        result = f"**worse** (p = {difference.p:.2g})"
    else:
        result = f"not significant (p = {difference.p:.2g})"
    return f"* `{entry}` against `{control}`: {difference} points, n = {difference.n}: {result}."


def overview(numbers: Numbers) -> str:
    rows = []
    # If all hold samples out, the validation split is used once, at the end.
    apart = all(run.is_judged_apart for run in numbers.runs)
    shown = (last,) if apart else (last, best)
    for entry in numbers.entries:
        image_timesteps, seconds = numbers.cost(entry)
        rows.append(
            [
                f"`{entry}`",
                str(numbers.timesteps(entry)),
                str(len(numbers.of(entry))),
                *(str(numbers.spread(entry, value)) for value in shown),
                *(str(numbers.difference(entry, value)) for value in shown),
                f"{numbers.spread(entry, loss).mean:.4f}",
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
        "The best epoch is chosen on the same samples, so it is biased upwards. "
        if best in shown
        else ""
    )
    return (
        f"{table}\n\nTop-1 on {first.samples} validation samples{split}: mean ± standard "
        "deviation over n seeds. Differences are between runs with the same seed, with the "
        f"95 % interval of the paired t-test. {flatters}Image-timesteps and seconds are medians "
        "and include the training of init and teacher; seconds exclude evaluations and depend "
        "on the machine's other load."
    )


def early_exit(numbers: Numbers) -> str:
    """Return the table of early exit at the chosen thresholds; empty without any."""
    if numbers.study.exit_within is None:
        return ""
    # An entry may have been trained with fewer timesteps than early exit may use.
    most = max(numbers.study.test_timesteps)

    def lost(result: Result) -> float:
        return exit_top1(result) - at(most)(result)

    rows = []
    for entry in numbers.entries:
        thresholds = [(result.chosen_exit or {}).get("threshold") for result in numbers.of(entry)]
        chosen = [threshold for threshold in thresholds if threshold is not None]
        rows.append(
            [
                f"`{entry}`",
                f"{min(chosen):.3f} to {max(chosen):.3f}" if chosen else "none",
                *(str(numbers.spread(entry, of)) for of in (exit_timesteps, exit_top1, lost)),
                *(str(numbers.difference(entry, of)) for of in (exit_timesteps, exit_top1)),
            ]
        )
    head = ["", "confidence", "average T", "top-1, %", "- at full T"]
    head += ["average T - control", "top-1 - control"]
    held_out = numbers.of(numbers.entries[0])[0].chosen_exit or {}
    fewer = [f"`{entry}`" for entry in numbers.entries if numbers.timesteps(entry) < most]
    beyond = (
        f"\n\nThe full T is {most}, more than the training of {' and '.join(fewer)} had."
        if fewer
        else ""
    )
    return (
        "Early exit: a sample is decided once the softmax of its time-mean reaches a confidence. "
        f"The confidence is the lowest that loses at most {numbers.study.exit_within:g} points on "
        f"the {held_out['chosen_on']['samples']} training samples that a run holds out:\n\n"
        f"{markdown(head, rows, numbers=True)}{beyond}"
    )


def by_timestep(numbers: Numbers) -> str:
    rows = []
    for entry in numbers.entries:
        found = {t: numbers.spread(entry, at(t)) for t in numbers.study.test_timesteps}
        trained = numbers.timesteps(entry)
        cells = [f"**{of}**" if t == trained else str(of) for t, of in found.items()]
        rows.append([f"`{entry}`", *cells])
    title = "Top-1, last epoch, by test T (bold: the T of training):"
    return f"{title}\n\n{_table_by_timestep(numbers, rows)}"


def difference_by_timestep(numbers: Numbers) -> str:
    """Return the table of differences at every T; empty without any."""
    rows = []
    for entry in numbers.entries:
        found = [numbers.difference(entry, at(t)) for t in numbers.study.test_timesteps]
        if found[0].n:
            control = numbers.study.entries[entry].control
            rows.append([f"`{entry}` - `{control}`", *map(str, found)])
    if not rows:
        return ""
    table = _table_by_timestep(numbers, rows)
    return f"Difference to the control by test T, with its 95 % interval:\n\n{table}"


def _table_by_timestep(numbers: Numbers, rows: list[list[str]]) -> str:
    head = ["tested at T =", *map(str, numbers.study.test_timesteps)]
    return markdown(head, rows, numbers=True)


def what_differs(numbers: Numbers) -> str:
    """Return the table of keys that have an effect and differ between entries."""
    entries = numbers.entries
    configs = {entry: numbers.of(entry)[0].run.config for entry in entries}
    flat = {entry: effective(config) for entry, config in configs.items()}
    for entry, config in configs.items():
        for i, phase in enumerate(config.phases):
            # A phase that some entries lack differs in all its keys: list only those that are set.
            if any(len(other.phases) <= i for other in configs.values()):
                is_set = flatten(phase.model_dump(mode="json", exclude_unset=True), f"phases.{i}.")
                flat[entry] = {
                    key: value
                    for key, value in flat[entry].items()
                    if key in is_set or not key.startswith(f"phases.{i}.")
                }
    keys = dict.fromkeys(key for entry in entries for key in flat[entry])
    columns = {
        f"`{key}`": [str(flat[entry].get(key, "")) for entry in entries]
        for key in keys
        if key not in OF_THE_RUN and len({str(flat[entry].get(key)) for entry in entries}) > 1
    }
    for head, names in (
        ("init", [numbers.study.entries[entry].init for entry in entries]),
        ("teacher", [numbers.study.entries[entry].teacher for entry in entries]),
    ):
        if any(names):
            columns[head] = [f"`{name}`" if name else "" for name in names]
    if not columns:
        return ""
    rows = list(zip((f"`{entry}`" for entry in entries), *columns.values(), strict=True))
    return f"Differences between the entries:\n\n{markdown(['', *columns], rows, numbers=True)}"


def commands(numbers: Numbers, link: str) -> str:
    runs = [numbers.of(entry)[0].run for entry in numbers.entries]
    listed = "\n".join(str(run.train_command) for run in runs)
    beyond = [run for run in runs if run.is_evaluated_again]
    tested = (
        "Accuracies that the training does not evaluate come from another command, for instance "
        f"`{beyond[0].eval_command}`.\n\n"
        if beyond
        else ""
    )
    return (
        '<details markdown="1"><summary>Commands</summary>\n\n'
        f"Commands of the first seed, {runs[0].seed}; "
        f"[{link.rpartition('/')[2]}]({link}) has those of all runs and every number.\n\n"
        f"```\n{listed}\n```\n\n{tested}</details>"
    )
