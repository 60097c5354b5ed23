"""Makes docs/results/STUDY.md, .json and .png, and the tables of docs/results.md.

    python tools/study.py STUDY --jobs 2
    python docs/make/study_pages.py runs/STUDY/report.json

With docs/results/STUDY.json, it makes the page anew; without a file, the tables alone. The answers
are in docs/make/answers.yaml; their numbers are blanks:

    {tet}                        top-1 of the entry tet at the T of training
    {tet: seeds}                 that of each seed
    {tet - sdt}                  difference of two entries, paired by seed
    {tet - sdt: 1}               the same at T=1; {tet: 1} is that of one entry
    {tet - sdt: exit_top1}       the same with early exit; also exit_timesteps and loss
    {tet - sdt: timesteps_at_equal_top1}        difference of timesteps at equal accuracy,
    {tet - sdt: exit_timesteps_at_equal_top1}   and with early exit
    {significant}                number of the study's differences that stay significant among
                                 those of all studies
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pages
import yaml

from tetdist.apps.reports import style
from tetdist.apps.studies import numbers as of_study
from tetdist.apps.studies import report
from tetdist.apps.studies.numbers import CONFIDENCE, Difference, Numbers, detectable, holm
from tetdist.config.overrides import flatten
from tetdist.storage.files import parse_json, write_json, write_text
from tetdist.tables import markdown
from tetdist.tracking.metrics_file import restored, strict

ANSWERS = Path(__file__).with_name("answers.yaml")
VALUES = {
    "top1": of_study.last,
    "loss": of_study.loss,
    "exit_top1": of_study.exit_top1,
    "exit_timesteps": of_study.exit_timesteps,
}
EQUAL = ("exit_timesteps_at_equal_top1", "timesteps_at_equal_top1")
BLANK = re.compile(r"\{([\w.-]+)(?: - ([\w.-]+))?(?:: (\w+))?\}")
CORRECTED = "Corrected for the"
# What is above it is written by hand.
MARK = "<!-- docs/make/study_pages.py writes what follows -->\n"
HEAD = [
    *("study: comparison", "T", "n", "at T: points [95 % CI], p", "minimum detectable effect"),
    "at T=1: points [95 % CI], p",
]


def filled(template: str, numbers: Numbers) -> str:
    """Return an answer with its blanks filled in."""

    def value(blank: re.Match[str]) -> str:
        entry, control, key = blank.groups()
        if entry == "significant":
            every = tested(published(pages.RESULTS))
            own = [one for one in every if one.title == numbers.study.title]
            of_all = f"{CORRECTED} {number_of_tests(every)} p values of all studies"
            return f"{of_all}, {significance(own)}."
        if key in EQUAL:
            return str(pages.timesteps_at_equal(numbers, entry, control)[EQUAL.index(key)])
        if key == "seeds":
            return ", ".join(f"{of_study.last(one):.2f}" for one in numbers.of(entry))
        of = of_study.at(int(key)) if key and key.isdigit() else VALUES[key or "top1"]
        return str(
            numbers.spread(entry, of) if control is None else numbers.difference(entry, of, control)
        )

    return BLANK.sub(value, " ".join(template.split()))


def draw(numbers: Numbers) -> Any:
    """Draw accuracy by T, and by mean timesteps with early exit or else the loss by epoch."""
    figure = style.new_figure(11, 4.8)
    by_timestep, second = figure.subplots(1, 2)
    tested, exits = numbers.study.test_timesteps, numbers.study.exit_within is not None
    controls = numbers.compared.values()
    for i, entry in enumerate(numbers.entries):
        results, look = numbers.of(entry), {"color": style.SERIES[i % len(style.SERIES)]}
        look |= {"linestyle": "--" if entry in controls else "-", "marker": "o"}
        points = [numbers.spread(entry, of_study.at(t)) for t in tested]
        bars = np.nan_to_num([point.std for point in points])
        means = [point.mean for point in points]
        by_timestep.errorbar(tested, means, bars, label=entry, capsize=3, **look)
        if exits:
            second.plot(*pages.mean_exit_curve(results, tested[-1]).T, **look)
            continue
        length = min(len(one.curve) for one in results)
        second.plot(*np.mean([one.curve[:length] for one in results], axis=0).T[:2], **look)
    by_timestep.set_xlabel("test T (bar: standard deviation over seeds)")
    style.finish(by_timestep, "Accuracy at every T", style.ACCURACY, legend=False)
    second.set_xlabel("average timesteps a sample" if exits else "epoch")
    title, unit = ("Early exit", style.ACCURACY) if exits else ("Loss", "of the time-mean")
    style.finish(second, title, unit, legend=False)
    handles = by_timestep.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def write(file: Path) -> None:
    """Write the page of a study by its report, or anew by the numbers of its page."""
    name = file.parent.name if file.name == "report.json" else file.stem
    numbers, page = pages.numbers_of(file), pages.RESULTS / f"{name}.md"
    answer = filled(yaml.safe_load(ANSWERS.read_text()).get(name, ""), numbers)
    shown = f"**Answer.** {answer}\n\n" if answer and not numbers.missing else ""
    shown += f"![{numbers.study.title}]({name}.png)\n\n"
    values = parse_json(file.read_text()) | {"answer": answer}
    write_json(page.with_suffix(".json"), strict(values))
    style.save(draw(numbers), page.with_suffix(".png"))
    write_text(page, report.page(numbers, name).replace("## Results\n", f"{shown}## Results\n", 1))


# --- the summary ----------------------------------------------------------------------------------


def summarise(folder: Path) -> Path:
    """Write the tables of all pages of a folder into the file beside it, below its `MARK`."""
    file, by_link = folder.parent / f"{folder.name}.md", published(folder)
    above = file.read_text().partition(MARK)[0].rstrip()
    write_text(file, f"{above}\n\n{MARK}{tet_against_sdt(by_link)}{answers(by_link)}")
    return file


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the numbers of all pages of a folder, by their link."""
    return {
        f"{folder.name}/{page.name}": restored(parse_json(page.with_suffix(".json").read_text()))
        for page in sorted(folder.glob("*.md"))
    }


def answers(by_link: dict[str, dict[str, Any]]) -> str:
    """Return the table of questions and answers, by the numbers of each page."""
    rows = []
    for link, values in by_link.items():
        study = values["study"]
        asked, mark, _ = " ".join(study["question"].split()).partition("?")
        entries = values.get("entries", {"": {"top1": values}})
        seeds = {str(entry["top1"]["n"]) for entry in entries.values()}
        question = f"[{asked}?]({link})" if mark else f"[{study['title']}]({link})"
        # The table above has the corrected p, the page each seed.
        answer = re.sub(rf" ?{CORRECTED} \d+ p values of all studies[^.]*\.", "", values["answer"])
        answer = re.sub(r" \(by seed [^)]*\)", "", answer)
        rows.append([question, answer, " to ".join(sorted(seeds))])
    table = markdown(["question, with its page", "answer", "n"], rows)
    return (
        "\n## All studies\n\nNumbers in brackets are 95 % intervals, uncorrected; ± is the "
        f"standard deviation over n seeds.\n\n{table}\n"
    )


class Tested(NamedTuple):
    """Difference of an entry from its control in which only the loss differs, with corrected p."""

    link: str
    title: str
    entry: str
    control: str
    timesteps: int
    last: Difference
    first: Difference | None  # at T=1
    p: float
    p_first: float


def tested(by_link: dict[str, dict[str, Any]]) -> list[Tested]:
    """Return all comparisons of losses; Holm's method corrects their p together."""
    rows: list[tuple[str, str, str, str, int, Difference, Difference | None]] = []
    for link, values in by_link.items():
        if "runs" not in values or "missing" not in values:
            continue
        for entry, against in values["differences"].items():
            if math.isnan(against["top1"]["p"]) or not _differ_in_loss(
                values["study"]["entries"], entry, against["control"]
            ):
                continue
            trained = next(run["timesteps"] for run in values["runs"] if run["entry"] == entry)
            place = (link, values["study"]["title"], entry, against["control"], trained)
            first = _at_first(values["runs"], entry, against["control"])
            rows.append((*place, Difference(**against["top1"]), first))
    both = [*(row[5] for row in rows), *(row[6] for row in rows)]
    corrected = holm([math.nan if one is None else one.p for one in both])
    halves = corrected[: len(rows)], corrected[len(rows) :]
    return [Tested(*row, *ps) for row, *ps in zip(rows, *halves, strict=True)]


def _at_first(runs: list[dict[str, Any]], entry: str, control: str) -> Difference | None:
    """Return the difference at T=1, also of studies that do not list it; None if untested."""
    first = {(run["entry"], run["seed"]): run["by_timestep"][0] for run in runs}
    seeds = [seed for name, seed in first if name == entry and (control, seed) in first]
    top1, control_top1 = ([first[name, seed] for seed in seeds] for name in (entry, control))
    if None in (*top1, *control_top1):
        return None
    return of_study.paired_difference(top1, control_top1)


def number_of_tests(comparisons: Iterable[Tested]) -> int:
    return sum(not math.isnan(p) for one in comparisons for p in (one.p, one.p_first))


def significance(comparisons: Iterable[Tested]) -> str:
    """Word how many differences are significant, for a page's answer and the summary."""
    ps = [(one.p, one.p_first) for one in comparisons]
    at, first = (
        f"{sum(p < 1 - CONFIDENCE for p in of)} of {sum(not math.isnan(p) for p in of)}"
        for of in zip(*ps, strict=True)
    )
    return f"{at} at the T of training and {first} at T=1 are significant"


def tet_against_sdt(by_link: dict[str, dict[str, Any]]) -> str:
    """Return the table of entries that differ from their control in `loss.kind` alone."""
    every, rows, before = tested(by_link), list[list[str]](), ""
    for test in every:
        title = f"[{test.title}]({test.link}): " if test.link != before else ""
        before = test.link
        row = [f"{title}`{test.entry}` - `{test.control}`", str(test.timesteps), str(test.last.n)]
        row += [_tested(test.last, test.p), f"{detectable(test.last):.2f}"]
        rows.append([*row, "" if test.first is None else _tested(test.first, test.p_first)])
    return (
        "\n## TET against SDT\n\nAll comparisons of an entry with its study's control in which "
        "only the loss differs: points of top-1 after the last epoch, paired by seed, at the T of "
        "training and stopped at T=1. The minimum detectable effect is that at the T of training, "
        "for a power of 80 %, uncorrected. p is the paired t-test's, corrected by Holm's method "
        f"for the {number_of_tests(every)} p values of the table. **{significance(every)} after "
        f"this correction** (bold).\n\n{markdown(HEAD, rows)}\n"
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


def main() -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("numbers", metavar="FILE", type=Path, nargs="?")
    file = parser.parse_args().numbers
    if file is not None:
        write(file)
    print(f"the summary is {summarise(pages.RESULTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
