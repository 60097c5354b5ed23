"""Parts that the scripts of result pages share."""

import argparse
import logging
from pathlib import Path
from typing import Any

from tetdist.apps.reports import style
from tetdist.apps.studies import numbers, plan
from tetdist.storage.files import write_json

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


def results_of(study: str) -> dict[str, list[numbers.Result]]:
    """Return the finished runs of a study in runs/, by entry and in the order of their seeds."""
    logging.basicConfig(level=logging.ERROR)
    runs = plan.runs_of(plan.read(plan.find(study)), ROOT / "runs" / study, [])
    found: dict[str, list[numbers.Result]] = {}
    for run in runs:
        if result := numbers.result_of(run):
            found.setdefault(run.entry, []).append(result)
    return found


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
