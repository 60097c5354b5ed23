"""The table of all studies at the top of a file of results."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tetdist.apps.studies import summary
from tetdist.apps.studies.numbers import Difference, exit_curve, paired_difference, timesteps_for
from tetdist.errors import UserError

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
        "entries": {"a": {"image_timesteps": 2e6}, "b": {"image_timesteps": 1.5e6}},
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
    assert [(row[0], row[2], row[4], row[7]) for row in rows] == [
        ("| [Title, second](#title-second)", "4", "**-3.00 [-4.00, -2.00]**", "2, 1.5 |"),
        ("| [Title, first](#title-first)", "4", "+0.50 [-0.50, +1.50]", "2, 1.5 |"),
    ]
    assert "of the 2 intervals" in "".join(lines)
    assert "an old table" not in lines


def test_a_file_without_a_summary_stays_as_it_is(tmp_path: Path) -> None:
    assert summary.refreshed("# Mine\n", tmp_path, tmp_path / "kept.md") == "# Mine\n"


@pytest.mark.parametrize(
    ("end", "numbers", "expected"),
    [
        ("", '{"study": {}, "candidates": {}}', "has no end"),
        (summary.END, "{}", "no numbers of a study"),
        (summary.END, "", "cannot be read"),
    ],
)
def test_mistakes_are_named(end: str, numbers: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(numbers)
    text = f"{summary.BEGIN}{end}<!-- study one -->\n"
    with pytest.raises(UserError, match=expected):
        summary.refreshed(text, tmp_path, tmp_path / "kept.md")


def test_timesteps_at_equal_accuracy_are_between_the_points_of_the_curves() -> None:
    by_timestep = [80.0, 84.0, 86.0, 90.0]
    curve = exit_curve(by_timestep, [(0.5, 82.0, 1.5), (0.9, 88.0, 2.0)], 4)
    assert curve == [(1.0, 80.0), (1.5, 82.0), (2.0, 88.0), (4.0, 90.0)]
    assert [timesteps_for(curve, top1) for top1 in (70, 80, 81, 85, 88, 89, 90)] == [
        *(1.0, 1.0, 1.25, 1.75, 2.0, 3.0, 4.0)
    ]
    assert math.isnan(timesteps_for(curve, 90.5))


def test_both_are_as_right_as_the_less_right_one_less_what_is_allowed() -> None:
    """Two seeds; at 87.5 % the one takes 1.75 timesteps and 2 of them, the other 3 and 3.5.

    All stopped at one t the one has them at t=2 and 3, the other at 4.
    """
    told = {"n": 2, "mean": 1.0, "low": 0.5, "high": 1.5, "p": 0.1}
    against = {f"exit_{key}": told for key in ("timesteps", "top1")} | {"control": "b"}

    def run(entry: str, seed: int, spent: float, last: float) -> dict[str, Any]:
        points = [(0.6, 87.0, spent - 0.25), (0.9, 88.0, spent + 0.25)]
        middle = {("a", 0): [87.5, 89.0], ("a", 1): [87.0, 88.0]}.get((entry, seed), [85.0, 87.0])
        accuracy = {"by_timestep": [80.0, *middle, last], "early_exit": points}
        return {"entry": entry, "seed": seed, "timesteps": 4} | accuracy

    values: dict[str, Any] = {
        "study": {"title": "Exits", "exit_within": 0.5, "test_timesteps": [1, 4]},
        "entries": {name: {"exit_timesteps": {"mean": 2.0}} for name in "ab"},
        "differences": {"a": against},
        "runs": [
            run("a", 0, 1.75, 90),
            run("a", 1, 2, 90),
            run("b", 0, 3, 88),
            run("b", 1, 3.5, 88),
        ],
    }

    def last_cells() -> list[str]:
        cells = summary.exits({"exits": values}).splitlines()[-1].split("|")
        return [cell.strip() for cell in cells[-3:-1]]

    by_t = str(paired_difference([2, 3], [4, 4]))
    assert last_cells() == [str(paired_difference([1.75, 2.0], [3.0, 3.5])), by_t]
    values["runs"][2]["early_exit"] = []  # as numbers of before curves were kept
    assert last_cells() == ["", by_t]
