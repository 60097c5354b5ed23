"""Summary of all studies that have a page in a folder."""

import math
from pathlib import Path
from typing import Any

from tetdist.apps.studies.numbers import CONFIDENCE, Difference, detectable, holm, read
from tetdist.config.identity import flatten
from tetdist.storage.files import explaining, write_text
from tetdist.tables import markdown

# What is above it is written by hand.
MARK = "<!-- tools/study.py --pages writes what follows -->\n"
HEAD = [
    *("study: comparison", "T", "n", "at T: points [95 % CI], p", "minimum detectable effect"),
    "at T=1: points [95 % CI], p",
]


def write(folder: Path) -> Path:
    """Write the tables of all pages of a folder into the file beside it, below its `MARK`."""
    file = folder.parent / f"{folder.name}.md"
    text = file.read_text() if file.is_file() else "# Results\n"
    pages = [page for page in sorted(folder.glob("*.md")) if page.with_suffix(".json").is_file()]
    read_ = {f"{folder.name}/{page.name}": read(page.with_suffix(".json")) for page in pages}
    studies = {link: values for link, values in read_.items() if "entries" in values}
    answered = {link: values for link, values in read_.items() if "answer" in values}
    above = text.partition(MARK)[0].rstrip()
    with explaining(file):
        write_text(file, f"{above}\n\n{MARK}{tet_against_sdt(studies)}{answers(answered)}")
    return file


def answers(pages: dict[str, dict[str, Any]]) -> str:
    """Return the table of questions and answers, by the numbers of each page."""
    rows = []
    for link, values in pages.items():
        study = values["study"]
        asked, mark, _ = " ".join(study["question"].split()).partition("?")
        entries = values.get("entries", {"": {"top1": values}})
        seeds = {str(entry["top1"]["n"]) for entry in entries.values()}
        question = f"[{asked}?]({link})" if mark else f"[{study['title']}]({link})"
        rows.append([question, values["answer"], " to ".join(sorted(seeds))])
    return (
        "\n## All studies\n\nNumbers in brackets are 95 % intervals, ± is the standard deviation "
        "over n seeds.\n\n" + markdown(["question, with its page", "answer", "n"], rows) + "\n"
    )


def tet_against_sdt(studies: dict[str, dict[str, Any]]) -> str:
    """Return the table of entries that differ from their control in `loss.kind` alone."""
    rows: list[list[str]] = []
    tested: list[tuple[Difference, Difference | None]] = []
    for link, values in studies.items():
        title = f"[{values['study']['title']}]({link})"
        for entry, against in values["differences"].items():
            entries = values["study"]["entries"]
            if math.isnan(against["top1"]["p"]) or not _differ_in_loss(
                entries, entry, against["control"]
            ):
                continue
            first = against["by_timestep"].get("1")
            trained = next(run["timesteps"] for run in values["runs"] if run["entry"] == entry)
            compared = f"`{entry}` - `{against['control']}`"
            rows.append([f"{title}: {compared}" if title else compared, str(trained)])
            tested.append((Difference(**against["top1"]), first and Difference(**first)))
            title = ""
    if not rows:
        return ""
    count = len(tested)
    both = [*(last for last, _ in tested), *(first for _, first in tested)]
    corrected = holm([math.nan if one is None else one.p for one in both])
    for row, (last, first), p, p_first in zip(
        rows, tested, corrected[:count], corrected[count:], strict=True
    ):
        row += [str(last.n), _tested(last, p), f"{detectable(last):.2f}"]
        row.append("" if first is None else _tested(first, p_first))
    survive = [sum(p < 1 - CONFIDENCE for p in ps) for ps in (corrected[:count], corrected[count:])]
    return (
        "\n## TET against SDT\n\nAll comparisons of an entry with its study's control in which "
        "only the loss differs: points of top-1 after the last epoch, between runs with the same "
        "seed, at the T of training and stopped "
        "at T=1. The minimum detectable effect is that at the T of training, for a power of 80 % "
        f"without correction. p is the paired t-test's, corrected by Holm's method for the "
        f"{sum(not math.isnan(p) for p in corrected)} p values of the table. **{survive[0]} of "
        f"{count} at the T of training and {survive[1]} of "
        f"{sum(first is not None for _, first in tested)} at T=1 are significant after this "
        f"correction** (bold).\n\n{markdown(HEAD, rows)}\n"
    )


def _differ_in_loss(entries: dict[str, Any], entry: str, control: str) -> bool:
    ours, theirs = (
        {**entries[name], **flatten(entries[name]["overrides"])} for name in (entry, control)
    )
    keys = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    return keys - {"overrides", "control"} == {"loss.kind"}


def _tested(difference: Difference, p: float) -> str:
    shown = str(difference) if math.isnan(p) else f"{difference}, {p:.2g}"
    return f"**{shown}**" if p < 1 - CONFIDENCE else shown
