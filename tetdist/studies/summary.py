"""One table of all studies that have a section in a Markdown file."""

import json
import math
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.reports.tables import markdown
from tetdist.studies.numbers import CONFIDENCE, Difference
from tetdist.tracking.metrics_file import restored

BEGIN, END = "<!-- summary of studies -->\n", "<!-- end of the summary -->\n"
POWER = 0.8
HEAD = [
    "study",
    "entry against its control",
    "n",
    "effect, points",
    "smallest that would be seen",
    "at T=1",
    "image-timesteps, millions",
]


def refreshed(text: str, folder: Path, file: Path) -> str:
    """The file's text with its summary made anew of the numbers in the folder.

    A file without the line that begins a summary stays as it is.

    Raises:
        UserError: The summary has no end, or a file of numbers is not a study's.
    """
    before, found, rest = text.partition(BEGIN)
    if not found:
        return text
    _, found, after = rest.partition(END)
    if not found:
        raise UserError(f"{file}: the summary that begins with {BEGIN.strip()} has no end; mend it")
    # In the order of their sections; a file of numbers without one was left over.
    names = [file.stem for file in folder.glob("*.json") if f"<!-- study {file.stem} -->" in text]
    names.sort(key=lambda name: text.index(f"<!-- study {name} -->"))
    studies = {name: _read(folder / f"{name}.json") for name in names}
    return f"{before}{BEGIN}{table(studies)}\n{END}{after}"


def _read(file: Path) -> dict[str, Any]:
    try:
        values = restored(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); run its study again") from None
    if not isinstance(values, dict) or not {"study", "entries", "differences"} <= values.keys():
        raise UserError(f"{file} has no numbers of a study; run it again")
    return values


def table(studies: dict[str, dict[str, Any]]) -> str:
    """The table: a row for each entry that has a control.

    Args:
        studies: By name, what `tetdist.studies.numbers.Numbers.as_dict` makes of a study.
    """
    rows = []
    for values in studies.values():
        link = _link(values)
        for entry, against in values["differences"].items():
            difference = Difference(**against["top1"])
            first = against["by_timestep"].get("1")
            rows.append(
                [
                    link,
                    f"`{entry}` - `{against['control']}`",
                    str(difference.n),
                    _marked(difference),
                    _number(detectable(difference)),
                    "" if first is None else _marked(Difference(**first)),
                    f"{values['entries'][entry]['image_timesteps'] / 1e6:.3g}",
                ]
            )
            link = ""
    return (
        f"{markdown(HEAD, rows)}\n\nThe effect is on top-1 of the last epoch at the T of training, "
        "paired by seed, with its 95 % interval; bold: the interval is without zero. With as many "
        "seeds and as much spread between them, a true difference of the size in the next column "
        "would have been told from chance four times in five. At T=1 the same networks are stopped "
        "after one timestep. No correction is made for the number of rows: of twenty comparisons "
        f"without effect one is expected to be bold.\n{exits(studies)}"
    )


def exits(studies: dict[str, dict[str, Any]]) -> str:
    """The table of early exit, of the studies that chose thresholds; empty without one."""
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
                ]
            )
            link = ""
    if not rows:
        return ""
    head = ["study", "entry against its control", "n", "may cost, points", "T of the entry"]
    head += ["of the control", "difference", "top-1 there, points"]
    return (
        "\nEarly exit, at thresholds chosen on training samples that each run held out: timesteps "
        f"of a sample on average, and what becomes of top-1.\n\n{markdown(head, rows)}\n"
    )


def detectable(difference: Difference) -> float:
    """The smallest true difference that a paired t-test of n pairs finds with a power of 80 %.

    By the usual sum of two quantiles of t, from the spread that was seen; NaN where n is 1.
    """
    from scipy import stats

    if math.isnan(difference.low):
        return math.nan
    t = [float(stats.t.ppf(p, difference.n - 1)) for p in (0.5 + CONFIDENCE / 2, POWER)]
    error = (difference.high - difference.low) / 2 / t[0]
    return sum(t) * error


def anchor(title: str) -> str:
    """The fragment by which GitHub and Python-Markdown link to a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return "-".join(kept.split())


def _link(values: dict[str, Any]) -> str:
    title = values["study"]["title"]
    return f"[{title}](#{anchor(title)})"


def _marked(difference: Difference) -> str:
    is_told = difference.low > 0 or difference.high < 0
    return f"**{difference}**" if is_told else str(difference)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"
