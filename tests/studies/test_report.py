"""The numbers of a study, its report, and the pages that docs/make makes of it."""

import importlib
import json
import math

import numpy as np
import pytest
import tiny
import yaml
from scipy import stats

from tetdist.apps.studies.numbers import Difference
from tetdist.apps.studies.report import page, results
from tetdist.tracking.metrics_file import restored

RESULTS = tiny.PROJECT / "docs" / "results"
RNG = np.random.default_rng(0)
ACCURACIES = {name: RNG.normal(mean, 1, (3, 4)) for name, mean in (("sdt", 90), ("tet", 92))}
# Runs that end in the middle of the second phase, T=2 for an epoch and then T=4.
FIRST = {"epochs": 1, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}}
PHASES = {"phases": [FIRST, FIRST | {"epochs": 3, "timesteps": 4}], "max_steps": 10}
FINISHED = {"seeds": [3, 4, 5], "test_timesteps": [1, 2, 4], "overrides": PHASES}


def accuracies(run):
    """Top-1 by timestep of a run of FINISHED."""
    return ACCURACIES[run.entry][run.seed - 3].tolist()


@pytest.fixture
def made(monkeypatch):
    """The script that makes the studies' pages."""
    monkeypatch.syspath_prepend(tiny.PROJECT / "docs" / "make")
    return importlib.import_module("study_pages")


def test_numbers_are_numpys(output_of, by_hand, tmp_path):
    by_hand(FINISHED, accuracies)
    file, output = tmp_path / "study.yaml", tmp_path / "out"
    arguments = (file, "tracking.uri=http://me:secret@host", "--report-only")
    output_of("study", *arguments, "--output", output, "--jobs", 2)
    report = (output / "report.md").read_text()
    text = (output / "report.json").read_text()
    assert "secret" not in report + text
    values = json.loads(text)
    for entry, of_entry in ACCURACIES.items():
        found = values["entries"][entry]
        for t in (1, 2, 4):
            column = of_entry[:, t - 1]
            expected = {"n": 3, "mean": column.mean(), "std": column.std(ddof=1)}
            assert found["by_timestep"][str(t)] == pytest.approx(expected)
        assert found["top1"] == found["by_timestep"]["4"]
        assert found["loss"] == pytest.approx({"n": 3, "mean": 4.25, "std": 1})
        assert found["image_timesteps"] == 5 * 8 * 2 + 5 * 8 * 4
        assert found["seconds"] == pytest.approx(4 + 2)
    difference = values["differences"]["tet"]
    assert difference["control"] == "sdt"
    for t, result in difference["by_timestep"].items():
        pairs = [ACCURACIES[entry][:, int(t) - 1] for entry in ("tet", "sdt")]
        test = stats.ttest_rel(*pairs)
        low, high = test.confidence_interval(0.95)
        expected = {"n": 3, "mean": np.subtract(*pairs).mean(), "low": low, "high": high}
        assert result == pytest.approx(expected | {"p": test.pvalue})
    assert difference["top1"] == difference["by_timestep"]["4"]

    top1 = ACCURACIES["tet"][:, 3]
    shown = f"{top1.mean():.2f} ± {top1.std(ddof=1):.2f}"
    assert f"| `tet` | 4 | 3 | {shown} | 0.00024 | 6 | `sdt` | " in report
    of_t = " | ".join(str(Difference(**one)) for one in difference["by_timestep"].values())
    assert f"| `tet` - `sdt` | {of_t} |\n" in report
    assert report.count(f" | **{shown}** |\n") == 1  # at the T of training
    # What differs between the entries, and how each was trained.
    assert "| `loss.kind` | sdt | tet |" in report
    assert f"runs_dir={output}" in report
    assert "name=tet-seed3" in report
    assert f"`python tools/study.py {file} tracking.uri=" in report


def test_cost_has_each_entry_that_is_needed_once(by_hand):
    numbers = by_hand({"entries.both": {"init": "sdt", "teacher": "sdt"}})
    alone = np.array(numbers.cost("sdt"))
    assert numbers.cost("both") == pytest.approx(2 * alone)


def test_keys_that_differ_are_listed_also_those_that_no_entry_names(by_hand):
    entries = {
        "base": {"overrides": {"model.neuron.kind": "lif"}},
        "plif": {"overrides": {"model.neuron.kind": "plif"}},
        "tet": {"control": "base", "overrides": {"loss": {"kind": "tet"}}},
    }
    numbers = by_hand({"entries": entries, "seeds": [3], "overrides": {"loss.lambda": 0.05}})
    found = {
        key: tuple(numbers.configurations[entry][key] for entry in ("base", "plif", "tet"))
        for key in numbers.configurations["base"]
    }
    assert found["model.neuron.kind"] == ("lif", "plif", "lif")
    assert found["model.neuron.surrogate"] == ("triangle", "sigmoid", "triangle")
    assert found["model.neuron.fires_at_threshold"] == ("false", "true", "false")
    # The whole section replaces the study's lambda.
    assert found["loss.lambda"] == ("0.05", "0.05", "0.001")
    assert not {"name", "seed", "loss.kind", "data.root"} & found.keys()


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        # Against 90, 90 and 90; the interval is of 4.3 standard errors to either side.
        ([92.0, 93.0, 94.0], "+3.00 [+0.52, +5.48] | 3.26 | 0.035 | 0.035 | **better**"),
        ([88.0, 87.0, 86.0], "-3.00 [-5.48, -0.52] | 3.26 | 0.035 | 0.035 | **worse**"),
        ([91.0, 92.0, 93.0], "+2.00 [-0.48, +4.48] | 3.26 | 0.074 | 0.074 | not significant"),
        ([91.0, 91.0, 91.0], "+1.00 |  |  |  | no test (no spread)"),
        # But for rounding.
        ([90.3, math.nextafter(90.3, 91)], "+0.30 |  |  |  | no test (no spread)"),
        ([88.0], "-2.00 |  |  |  | no test (one seed)"),
    ],
)
def test_a_verdict_is_as_sure_as_the_interval(by_hand, top1, words):
    def of(run):
        return [0.0, 0.0, 0.0, top1[run.seed] if run.entry == "tet" else 90.0]

    numbers = by_hand({"seeds": list(range(len(top1))), "test_timesteps": [4]}, of)
    assert f" | `sdt` | {words} |\n" in results(numbers)


def test_the_corrected_p_decides(by_hand):
    def of(run):
        return [0.0, 0.0, 0.0, 90.0 if run.entry == "sdt" else 92.0 + run.seed]

    entries = {"sdt": {}, "alone": {}} | {f"tet{i}": {"control": "sdt"} for i in range(3)}
    numbers = by_hand({"entries": entries, "seeds": [0, 1, 2]}, of)
    text = results(numbers)
    assert text.count("| 0.035 | 0.11 | not significant |\n") == 3
    numbers.results["sdt"].pop(0)
    assert (text.count("(n = 2)"), results(numbers).count("(n = 2)")) == (0, 3)
    assert text.count("|  |  |  |  |  |  |\n") == 2
    assert "for the 3 comparisons" in text


# --- docs/make ------------------------------------------------------------------------------------


def test_published_answers_and_tables_are_those_of_their_numbers(made):
    templates = yaml.safe_load(made.ANSWERS.read_text())
    files = [file for file in RESULTS.glob("*.json") if '"missing"' in file.read_text()]
    assert templates.keys() == {file.stem for file in files}
    for file in files:
        numbers, published = made.pages.numbers_of(file), file.with_suffix(".md").read_text()
        answer = made.filled(templates[file.stem], numbers)
        assert answer == json.loads(file.read_text())["answer"]
        assert f"**Answer.** {answer}\n" in published
        for entry in numbers.entries:
            trained, runs = numbers.of(entry)[0].timesteps, len(numbers.of(entry))
            top1 = numbers.spread(entry, made.VALUES["top1"])
            assert f"| `{entry}` | {trained} | {runs} | {top1} |" in published
        for entry in numbers.compared:
            one = numbers.difference(entry, made.VALUES["top1"])
            assert f" | {one} | " in published
        assert page(numbers, file.stem).startswith(f"# {numbers.study.title}\n")


def test_the_projects_own_summary_is_that_of_its_numbers(made, tmp_path):
    (tmp_path / "results").symlink_to(RESULTS)
    summary = RESULTS.with_suffix(".md").read_text()
    copy = tmp_path / "results.md"
    copy.write_text(summary.replace("## TET against SDT", "## An old table"))
    assert made.summarise(tmp_path / "results").read_text() == summary
    assert len(summary.splitlines()) <= 150


def test_the_page_of_losses_is_that_of_its_numbers(made):
    file = RESULTS / "losses.json"
    found = restored(json.loads(file.read_text()))
    answer, seeds, tables, _ = importlib.import_module("losses").page_of(found)
    assert (answer, seeds) == (found["answer"], found["n"])
    text, ps = file.with_suffix(".md").read_text(), [row["holm"] for row in found["differences"]]
    assert made.pages.with_tables(made.pages.with_answer(text, answer), tables) == text
    assert f"corrects p for all {sum(map(len, ps))} p values" in text
