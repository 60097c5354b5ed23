"""Summary table of all studies that have a section in a Markdown file."""

import math
from pathlib import Path
from typing import Any

from tetdist.apps.studies.numbers import (
    CONFIDENCE,
    Difference,
    exit_curve,
    paired_difference,
    timesteps_for,
)
from tetdist.errors import UserError
from tetdist.storage.files import parse_json
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import restored

BEGIN, END = "<!-- summary of studies -->\n", "<!-- end of the summary -->\n"
POWER = 0.8
HEAD = [
    "study",
    "entry - control",
    "T",
    "seeds",
    "effect on top-1, points",
    "minimum detectable effect (80 % power)",
    "effect at T=1, points",
    "image-timesteps, millions: entry, control",
]
EXIT_HEAD = [
    "study",
    "entry - control",
    "seeds",
    "allowed loss, points",
    "timesteps, entry",
    "timesteps, control",
    "timesteps, entry - control",
    "top-1, entry - control, points",
    "timesteps at equal accuracy, entry - control",
    "the same, all samples stopped at one t",
]


def refreshed(text: str, folder: Path, file: Path) -> str:
    """Return the file's text with its summary updated from the numbers in the folder.

    A file without a summary stays unchanged.

    Raises:
        UserError: The summary has no end, or a file of numbers is not a study's.
    """
    if BEGIN not in text:
        return text
    # Follow the order of the sections; a file of numbers without a section is a leftover.
    names = [file.stem for file in folder.glob("*.json") if f"<!-- study {file.stem} -->" in text]
    names.sort(key=lambda name: text.index(f"<!-- study {name} -->"))
    read = {name: _read(folder / f"{name}.json") for name in names}
    studies = {name: values for name, values in read.items() if "candidates" not in values}
    return between(text, BEGIN, END, f"{table(studies)}\n", file)


def between(text: str, begin: str, end: str, content: str, file: Path) -> str:
    """Replace the content between two lines of a text, the first of which exists.

    Raises:
        UserError: The second line is missing.
    """
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise UserError(
            f"{file}: the section that begins with {begin.strip()} has no end; add {end.strip()}"
        )
    return f"{before}{begin}{content}{end}{after}"


def _read(file: Path) -> dict[str, Any]:
    try:
        values = restored(parse_json(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); run its study again") from None
    of_one = ({"study", "entries", "differences"}, {"study", "candidates"})
    if not isinstance(values, dict) or not any(keys <= values.keys() for keys in of_one):
        raise UserError(f"{file} has no numbers of a study; run its study again")
    return values


def table(studies: dict[str, dict[str, Any]]) -> str:
    """Return the table with a row for each entry that has a control, by `Numbers.as_dict` of each
    study.
    """
    rows, intervals = [], 0
    for values in studies.values():
        link = _link(values)
        for entry, against in values["differences"].items():
            difference = Difference(**against["top1"])
            first = against["by_timestep"].get("1")
            trained = next(run["timesteps"] for run in values["runs"] if run["entry"] == entry)
            costs = [
                values["entries"][name]["image_timesteps"] / 1e6
                for name in (entry, against["control"])
            ]
            intervals += 1 if first is None else 2
            rows.append(
                [
                    link,
                    f"`{entry}` - `{against['control']}`",
                    str(trained),
                    str(difference.n),
                    _marked(difference),
                    _number(detectable(difference)),
                    "" if first is None else _marked(Difference(**first)),
                    ", ".join(f"{cost:.3g}" for cost in costs),
                ]
            )
            link = ""
    return (
        f"{markdown(HEAD, rows)}\n\nEffects are differences of top-1 after the last epoch between "
        "runs with the same seed, in percentage points, with 95 % intervals: at the T of "
        "training and, if a study tests it, with the same networks stopped after one timestep. "
        "Bold: the 95 % interval excludes zero. Intervals cover the seeds alone: all runs of a "
        "study use the same validation samples, and among a hundred samples, one is a point. "
        "The minimum detectable effect is the true effect that this number of seeds, with the "
        "observed spread, would show as significant with a probability of 80 %; three seeds "
        "estimate the spread to within a factor of 0.5 to 6.3, five to within 0.6 to 2.9. "
        f"There is no correction for multiple comparisons: one in twenty of the {intervals} "
        "intervals would be bold without any effect. Image-timesteps are the training images "
        "times T of one run, including the training of its init and teacher, excluding the "
        f"teacher's forward passes in the training of its student.\n{exits(studies)}"
    )


def exits(studies: dict[str, dict[str, Any]]) -> str:
    """Return the table of early exit, for studies that chose thresholds; empty without one."""
    rows = []
    for values in studies.values():
        link = _link(values)
        for entry, against in values["differences"].items():
            if "exit_timesteps" not in against:
                continue
            control = against["control"]
            of_both = [
                values["entries"][name]["exit_timesteps"]["mean"] for name in (entry, control)
            ]
            found = [Difference(**against[f"exit_{key}"]) for key in ("timesteps", "top1")]
            rows.append(
                [
                    link,
                    f"`{entry}` - `{control}`",
                    str(found[0].n),
                    f"{values['study']['exit_within']:g}",
                    *(f"{mean:.2f}" for mean in of_both),
                    *map(_marked, found),
                    *_of_equal_accuracy(values, entry, control),
                ]
            )
            link = ""
    if not rows:
        return ""
    return (
        "\nEarly exit uses the lowest threshold at which a run loses at most the allowed points "
        "on the training samples that it holds out. The table has the average timesteps a "
        "validation sample, and the difference of top-1 with early exit. The last two columns "
        "compare timesteps at equal accuracy: that of the less accurate run of a pair with the "
        "same seed at the last timestep, less the allowed points. The first takes the threshold "
        "that reaches this accuracy on the validation samples, interpolated between the tried "
        "ones; the second takes the first t at which all samples, stopped there, reach it.\n\n"
        f"{markdown(EXIT_HEAD, rows)}\n"
    )


def _of_equal_accuracy(values: dict[str, Any], entry: str, control: str) -> tuple[str, str]:
    """Return the differences of timesteps at equal top-1, with early exit and with one t for all.

    The former is empty if the numbers have no curves.
    """
    most, within = max(values["study"]["test_timesteps"]), values["study"]["exit_within"]
    runs = {(run["entry"], run["seed"]): run for run in values["runs"]}
    by_exit: dict[str, list[float]] = {entry: [], control: []}
    by_t: dict[str, list[float]] = {entry: [], control: []}
    for (name, seed), run in runs.items():
        against = runs.get((control, seed))
        if name != entry or against is None:
            continue
        top1 = min(one["by_timestep"][most - 1] for one in (run, against)) - within
        for one in (run, against):
            reached = (t for t, of_t in enumerate(one["by_timestep"], start=1) if of_t >= top1)
            by_t[one["entry"]].append(next(reached))
            if one.get("early_exit"):
                curve = exit_curve(one["by_timestep"], one["early_exit"], most)
                by_exit[one["entry"]].append(timesteps_for(curve, top1))
    one_t = _marked(paired_difference(by_t[entry], by_t[control]))
    if not len(by_exit[entry]) == len(by_exit[control]) == len(by_t[entry]):
        return "", one_t
    return _marked(paired_difference(by_exit[entry], by_exit[control])), one_t


def detectable(difference: Difference) -> float:
    """Return the smallest true difference that a paired t-test of n pairs finds at 80 % power.

    The observed spread is taken as the true one. NaN for a single pair.
    """
    from scipy import optimize, stats

    if math.isnan(difference.low):
        return math.nan
    freedom = difference.n - 1
    limit = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))
    error = (difference.high - difference.low) / 2 / limit

    def lacking(size: float) -> float:
        return POWER - float(stats.nct.sf(limit, freedom, size))

    # In standard errors; two seeds need the most, 16.
    return error * float(optimize.brentq(lacking, 0.1, 100.0))


def anchor(title: str) -> str:
    """Return the fragment by which GitHub and Python-Markdown link to a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return "-".join(kept.split())


def _link(values: dict[str, Any]) -> str:
    title = values["study"]["title"]
    return f"[{title}](#{anchor(title)})"


def _marked(difference: Difference) -> str:
    is_significant = difference.low > 0 or difference.high < 0
    return f"**{difference}**" if is_significant else str(difference)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
