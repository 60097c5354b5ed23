"""The summary of all studies, and the statistics that it shares with their pages."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tetdist.apps.studies import summary
from tetdist.apps.studies.numbers import (
    Difference,
    detectable,
    exit_curve,
    holm,
    paired_difference,
    timesteps_at_equal,
    timesteps_for,
)

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = PROJECT / "docs" / "results.md"


def test_the_projects_own_summary_is_that_of_its_numbers(tmp_path):
    (tmp_path / "results").symlink_to(RESULTS.with_suffix(""))
    copy = tmp_path / "results.md"
    copy.write_text(RESULTS.read_text())
    assert summary.write(tmp_path / "results").read_text() == RESULTS.read_text()
    assert len(RESULTS.read_text().splitlines()) <= 150


def test_what_would_be_seen_is_seen_four_times_in_five():
    random = np.random.default_rng(0)
    n, error = 5, 0.4
    half = 2.7764 * error / math.sqrt(n)  # t at 97.5 % with four degrees of freedom
    size = detectable(Difference(n, 0.0, -half, half, 1.0))
    told = [
        paired_difference(list(random.normal(size, error, n)), [0.0] * n).low > 0
        for _ in range(2000)
    ]
    assert 0.76 < np.mean(told) < 0.84
    assert math.isnan(detectable(Difference(1, 2.0, math.nan, math.nan, math.nan)))


def test_holm_corrects_for_the_number_of_tests():
    """By hand: 0.01 x 4, then 0.02 x 3, then 0.025 x 2, which must not be less, then 0.9."""
    given = [0.02, math.nan, 0.9, 0.01, 0.025]
    expected = [0.06, math.nan, 0.9, 0.04, 0.06]
    assert holm(given) == pytest.approx(expected, nan_ok=True)
    assert holm([0.6, 0.6]) == [1.0, 1.0]


def _study(folder, name, p, control):
    difference = {"n": 3, "mean": 2.0, "low": 1.0, "high": 3.0, "p": p}
    entries = {
        "a": {"overrides": {"model.name": "net"}, "control": "b"},
        "b": {"overrides": control, "control": None},
    }
    values = {
        "study": {"title": f"Title {name}", "question": "Is it\nso? It may.", "entries": entries},
        "answer": "It is.",
        "entries": {name: {"top1": {"n": 3}} for name in "ab"},
        "runs": [{"entry": "a", "timesteps": 4}],
        "differences": {"a": {"control": "b", "top1": difference, "by_timestep": {}}},
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values))
    (folder / f"{name}.md").touch()


def test_comparisons_of_the_loss_alone_are_corrected_together(tmp_path):
    pages = tmp_path / "kept"
    _study(pages, "first", 0.03, {"model.name": "net", "loss.kind": "sdt"})
    _study(pages, "second", 0.02, {"model": {"name": "net"}, "loss": {"kind": "sdt"}})
    _study(pages, "other", 0.001, {"model.name": "net", "loss.kind": "sdt", "loss.phi": 2})
    (pages / "left_over.json").write_text("[]")  # Without a page.
    text = summary.write(pages).read_text()
    assert text.startswith(f"# Results\n\n{summary.MARK}\n## TET against SDT\n")
    rows = [line for line in text.splitlines() if "`a` - `b`" in line]
    shown = "`a` - `b` | 4 | 3 | **+2.00 [+1.00, +3.00], 0.04** | 1.31 |  |"
    assert rows == [
        f"| [Title first](kept/first.md): {shown}",
        f"| [Title second](kept/second.md): {shown}",
    ]
    assert "**2 of 2 at the T of training and 0 of 0 at T=1 are significant" in text
    assert text.count("(kept/other.md)") == 1
    assert "| [Is it so?](kept/other.md) | It is. | 3 |" in text


def test_timesteps_at_equal_accuracy_are_between_the_points_of_the_curves():
    by_timestep = [80.0, 84.0, 86.0, 90.0]
    curve = exit_curve(by_timestep, [(0.5, 82.0, 1.5), (0.9, 88.0, 2.0)], 4)
    assert curve == [(1.0, 80.0), (1.5, 82.0), (2.0, 88.0), (4.0, 90.0)]
    assert [timesteps_for(curve, top1) for top1 in (70, 80, 81, 85, 88, 89, 90)] == [
        *(1.0, 1.0, 1.25, 1.75, 2.0, 3.0, 4.0)
    ]
    assert math.isnan(timesteps_for(curve, 90.5))


def test_both_are_as_right_as_the_less_right_one_less_what_is_allowed():
    """At 87.5 % the one takes 1.75 timesteps, or 2 for all samples, the other 3, or 4."""

    def result(spent, *by_timestep):
        points = [(0.6, 87.0, spent - 0.25), (0.9, 88.0, spent + 0.25)]
        return SimpleNamespace(by_timestep=by_timestep, early_exit=points)

    pair = (result(1.75, 80, 87.5, 89, 90), result(3, 80, 85, 87, 88))
    assert timesteps_at_equal(pair, 4, 0.5) == [[1.75, 3.0], [2, 4]]
