"""Report of a study in Markdown."""

import json
import math
import time
from pathlib import Path
from typing import Any

from tetdist.apps.reports import style
from tetdist.apps.studies import figures
from tetdist.apps.studies.numbers import (
    CONFIDENCE,
    EQUAL,
    Difference,
    Numbers,
    Result,
    at,
    best,
    detectable,
    exit_timesteps,
    exit_top1,
    holm,
    last,
    loss,
)
from tetdist.apps.studies.plan import TEACHER_KEY, as_text
from tetdist.config.identity import flatten
from tetdist.errors import UserError, without_passwords
from tetdist.storage.files import explaining, write_text
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import strict
from tetdist.wording import are, counted

# Keys that a study sets itself, or that an entry's init and teacher set.
OF_THE_RUN = ("name", "seed", "init_checkpoint", TEACHER_KEY)

# --- the report -----------------------------------------------------------------------------------


def write(numbers: Numbers, file: Path, command: str) -> None:
    """Write a study's page, with figure and numbers beside it."""
    if not numbers.entries:
        raise UserError(
            f"nothing to report: none of {counted(len(numbers.runs), 'run')} is finished and "
            "evaluated; the same command without --report-only trains them"
        )
    put(file, page(numbers, file.stem, command), figures.draw(numbers), numbers.as_dict())


def put(file: Path, page: str, figure: Any, values: dict[str, Any]) -> None:
    """Write the page of a study or search, with figure and numbers beside it."""
    numbers = json.dumps(strict(values), indent=1, allow_nan=False)
    with explaining(file):
        style.save(figure, file.with_suffix(".png"))
        write_text(file.with_suffix(".json"), without_passwords(numbers) + "\n")
        write_text(file, page)


def page(numbers: Numbers, name: str, command: str) -> str:
    """Return the page in Markdown; figure and numbers are beside it, by this name."""
    study = numbers.study
    parts = [f"# {study.title}", study.question.strip()]
    if numbers.answer:
        parts.append(f"**Answer.** {numbers.answer}")
    if numbers.missing:
        parts.append(
            f"**Incomplete**: {len(numbers.missing)} of {counted(len(numbers.runs), 'run')} "
            f"{are(len(numbers.missing))} missing ({', '.join(numbers.missing)})."
        )
    parts += [
        comparisons(numbers),
        overview(numbers),
        f"![{study.title}]({name}.png)",
        early_exit(numbers),
        by_timestep(numbers),
        difference_by_timestep(numbers),
        what_differs(numbers),
        differs_unnamed(numbers),
        provenance(numbers, name, command),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def provenance(numbers: Numbers, name: str, command: str) -> str:
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
        f"## Provenance\n\n`{command}`\n\nFinished on {day.lstrip('0')}{of}, on {described}. "
        f"[{name}.json]({name}.json) has every number, and the commands of all runs. Those of the "
        f"first seed, {firsts[0].run.seed}:\n\n```\n{listed}\n```"
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
        theirs = flatten(configs[other].as_dict())
        of_kind = {f"model.neuron.{key}" for key in configs[entry].model.changed_by_kind}
        keys = [
            f"`{key}={as_text(value)}` ({as_text(theirs[key]) if key in theirs else 'none'})"
            for key, value in flatten(configs[entry].as_dict()).items()
            if (key in theirs or key in of_kind) and value != theirs.get(key)
            if not any(f"{key}.".startswith(f"{n}.") or n.startswith(f"{key}.") for n in named)
        ]
        if keys:
            listed.append(f"* `{entry}` against `{other}`: {', '.join(keys)}")
    if not listed:
        return ""
    lines = "\n".join(listed)
    return f"Entries also differ in keys that they do not set, here with both values:\n\n{lines}"


def comparisons(numbers: Numbers) -> str:
    """Return the table of entries and their controls; empty without any."""
    found = {entry: numbers.difference(entry, last) for entry in numbers.entries}
    found = {entry: difference for entry, difference in found.items() if difference.n}
    if not found:
        return ""
    several = len(found) > 1
    corrected = holm([difference.p for difference in found.values()])
    rows = []
    for (entry, difference), p in zip(found.items(), corrected, strict=True):
        control = numbers.study.entries[entry].control
        row = [f"`{entry}` - `{control}`", str(difference.n), str(difference)]
        row += [_number(detectable(difference)), _number(difference.p, ".2g")]
        rows.append([*row, *([_number(p, ".2g")] if several else []), verdict(difference, p)])
    head = ["", "n", "points [95 % CI]", "minimum detectable effect", "p"]
    head += [*(["p, Holm"] if several else []), "result"]
    holms = (
        f" Holm's method corrects p for the {len(found)} comparisons; it decides the result."
        if several
        else ""
    )
    return (
        f"## Comparisons\n\n{markdown(head, rows, numbers=True)}\n\nDifference of top-1 after the "
        "last epoch, at the T of training, between runs with the same seed, with the 95 % interval "
        f"and p of the paired t-test.{holms} The minimum detectable effect is the true difference "
        "that n seeds with this spread would show as significant with a probability of 80 %."
    )


def verdict(difference: Difference, p: float) -> str:
    """Describe the result of a comparison, by its corrected p."""
    if difference.n == 1:
        return "no test (one seed)"
    if math.isnan(difference.low):
        return "no test (no spread)"
    if p >= 1 - CONFIDENCE:
        return "not significant"
    return "**better**" if difference.mean > 0 else "**worse**"


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
                f"{numbers.spread(entry, loss).mean:.4f}",
                f"{image_timesteps / 1e6:.3g}",
                f"{seconds:.0f}",
            ]
        )
    epochs = ["last", "best"][: len(shown)]
    head = ["", "T", "n", *(f"{one} epoch, %" for one in epochs)]
    head += ["loss", "image-timesteps, millions", "training, s"]
    table = markdown(head, rows, numbers=True)
    first = numbers.of(numbers.entries[0])[0]
    split = f" of the split {first.data_split}" if first.data_split else ""
    flatters = (
        "The best epoch is chosen on the same samples, so it is biased upwards. "
        if best in shown
        else ""
    )
    return (
        f"## Accuracy and cost\n\n{table}\n\nTop-1 on {first.samples} validation samples{split}: "
        f"mean ± standard deviation over n seeds. {flatters}Image-timesteps (training images times "
        "T) and seconds are medians and include the training of init and teacher; seconds exclude "
        "evaluations and depend on the machine's other load."
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
        "## Early exit\n\nA sample is decided once the softmax of its time-mean reaches a "
        "confidence. The confidence is the lowest that loses at most "
        f"{numbers.study.exit_within:g} points on the {held_out['chosen_on']['samples']} training "
        f"samples that a run holds out:\n\n{markdown(head, rows, numbers=True)}{beyond}"
        f"{at_equal_accuracy(numbers)}"
    )


def at_equal_accuracy(numbers: Numbers) -> str:
    """Return the table of timesteps at equal accuracy; empty without a comparison."""
    rows = []
    for entry in numbers.entries:
        found = numbers.at_equal_top1(entry)
        if found[EQUAL[0]].n:
            control = numbers.study.entries[entry].control
            rows.append([f"`{entry}` - `{control}`", *map(str, found.values())])
    if not rows:
        return ""
    table = markdown(["", "early exit", "all samples stopped at one t"], rows, numbers=True)
    return (
        "\n\nDifference of timesteps at equal accuracy, which is that of the less accurate run of "
        f"a pair at the last timestep less {numbers.study.exit_within:g} points. With early exit, "
        "the threshold reaches this accuracy on the validation samples, interpolated between the "
        f"tried ones; without it, t is the first at which all samples reach it:\n\n{table}"
    )


def by_timestep(numbers: Numbers) -> str:
    rows = []
    for entry in numbers.entries:
        found = {t: numbers.spread(entry, at(t)) for t in numbers.study.test_timesteps}
        trained = numbers.timesteps(entry)
        cells = [f"**{of}**" if t == trained else str(of) for t, of in found.items()]
        rows.append([f"`{entry}`", *cells])
    title = (
        "## Accuracy at each T\n\nTop-1 after the last epoch, by test T (bold: the T of training):"
    )
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
    """Return the table of keys that differ between entries."""
    entries = numbers.entries
    configs = {entry: numbers.of(entry)[0].run.config for entry in entries}
    flat = {entry: flatten(config.as_dict()) for entry, config in configs.items()}
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
        if key not in (*OF_THE_RUN, "imports")  # imports are paths of this machine
        and len({str(flat[entry].get(key)) for entry in entries}) > 1
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
    return f"## Differences between the entries\n\n{markdown(['', *columns], rows, numbers=True)}"


def _number(value: float, form: str = ".2f") -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
