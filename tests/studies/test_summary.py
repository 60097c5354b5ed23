"""The table of all studies at the top of a file of results."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tetdist.errors import UserError
from tetdist.studies import summary
from tetdist.studies.numbers import Difference, paired_difference

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = PROJECT / "docs" / "results.md"


def test_the_projects_own_table_is_that_of_its_numbers() -> None:
    text = RESULTS.read_text()
    assert summary.BEGIN in text
    assert summary.refreshed(text, RESULTS.with_suffix(""), RESULTS) == text


def test_what_would_be_seen_is_seen_four_times_in_five() -> None:
    random = np.random.default_rng(0)
    n, error = 5, 0.4
    half = 2.7764 * error / math.sqrt(n)  # t at 97.5 % with four degrees of freedom
    size = summary.detectable(Difference(n, 0.0, -half, half, 1.0))
    told = [
        paired_difference(list(random.normal(size, error, n)), [0.0] * n).low > 0
        for _ in range(2000)
    ]
    assert 0.76 < np.mean(told) < 0.84


def test_one_seed_says_nothing_about_what_would_be_seen() -> None:
    assert math.isnan(summary.detectable(Difference(1, 2.0, math.nan, math.nan, math.nan)))


def _study(folder: Path, name: str, mean: float) -> None:
    difference = {"n": 3, "mean": mean, "low": mean - 1, "high": mean + 1, "p": 0.1}
    values = {
        "study": {"title": f"Title, {name}"},
        "entries": {"a": {"image_timesteps": 2e6}},
        "runs": [{"entry": "a", "timesteps": 4}, {"entry": "b", "timesteps": 2}],
        "differences": {"a": {"control": "b", "top1": difference, "by_timestep": {}}},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))


def test_rows_are_in_the_order_of_sections_and_bold_without_zero(tmp_path: Path) -> None:
    file = tmp_path / "kept.md"
    for name, mean in (("first", 0.5), ("second", -3.0), ("left_over", 9.0)):
        _study(tmp_path / "kept", name, mean)
    text = (
        f"{summary.BEGIN}an old table\n{summary.END}<!-- study second -->\n<!-- study first -->\n"
    )
    lines = summary.refreshed(text, tmp_path / "kept", file).splitlines()
    rows = [line.split(" | ") for line in lines if "`a` - `b`" in line]
    assert [(row[0], row[2], row[4]) for row in rows] == [
        ("| [Title, second](#title-second)", "4", "**-3.00 [-4.00, -2.00]**"),
        ("| [Title, first](#title-first)", "4", "+0.50 [-0.50, +1.50]"),
    ]
    assert "of the 2 intervals" in "".join(lines)
    assert "an old table" not in lines


def test_a_file_without_a_summary_stays_as_it_is(tmp_path: Path) -> None:
    assert summary.refreshed("# Mine\n", tmp_path, tmp_path / "kept.md") == "# Mine\n"


@pytest.mark.parametrize(
    ("end", "numbers", "said"),
    [
        ("", "{}", "has no end"),
        (summary.END, "{}", "no numbers of a study"),
        (summary.END, "", "cannot be read"),
    ],
)
def test_mistakes_are_named(end: str, numbers: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(numbers)
    text = f"{summary.BEGIN}{end}<!-- study one -->\n"
    with pytest.raises(UserError, match=said):
        summary.refreshed(text, tmp_path, tmp_path / "kept.md")
