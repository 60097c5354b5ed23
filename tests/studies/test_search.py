"""A search by successive halving: who goes on, what is evaluated on what, and that it goes on."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from tetdist.apps.studies import search, search_report, summary
from tetdist.apps.studies.plan import STUDIES_DIR
from tetdist.errors import UserError

RATES = {"c01": 0.001, "c02": 0.05, "c03": 1e30, "c04": 0.2}


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes search.yaml, over four learning rates of a training of 3 epochs."""
    base = tiny_config({"phases.0.epochs": 3, "engine": "torch"})

    def made(changes=None):
        values = {
            "title": "A tiny search",
            "config": str(base),
            "seeds": [0],
            "overrides": {"non_finite_limit": 1},
            "search": {
                "over": {"phases.0.optimizer.lr": list(RATES.values())},
                "held_out": 0.3,
                "rungs": [1, 2],
                # So that two of the four go on, and one if those that failed were not counted.
                "eta": 3,
            },
        }
        file = tmp_path / "search.yaml"
        # A key of `over` has dots in it, which `changed` would take for several keys.
        given = dict(changes or {})
        over = given.pop("over", None)
        values = tiny.changed(values, given)
        if over is not None:
            values["search"]["over"] = over
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return made


def test_halving_goes_on_after_a_stop_and_sees_validation_once(call, write, here, main, tmp_path):
    file, output = write(), tmp_path / "out"
    arguments = ("study", file, "--output", output)
    status, printed = call(*arguments, "--dry-run")
    assert status == 0, printed
    # 4 x 1 + 2 x 1 + 3 epochs.
    assert "4 candidates to epoch 1, 2 candidates to epoch 2, " in printed
    assert "9 epochs in total, equal to 3 full trainings" in printed
    _, printed = call("study", write({"seeds": [0, 1]}), "--output", output, "--dry-run")
    assert "with 2 seeds: 18 epochs in total, equal to 6 full trainings" in printed
    write()
    assert not output.exists()

    here.interrupt_at = 3
    status, printed = call(*arguments)
    assert status == 130, printed
    here.interrupt_at = -1
    status, printed = call(*arguments)
    assert status == 0, printed

    # What was trained before the stop is not trained again, nor is what did not stay finite.
    given = [dict(word.partition("=")[::2] for word in words) for words in here.started]
    names = [values["name"].removesuffix("-seed0") for values in given]
    assert names[:4] == ["c01", "c02", "c03", "c04"]
    steps = [values.get("max_steps") for values in given]
    assert steps == ["4", "4", "4", "4", "8", "8", None]  # an epoch of 32 samples has 4 steps of 8
    validations = {name: tiny.metrics(output / f"{name}-seed0", "val") for name in RATES}
    assert validations["c03"] == []
    assert {line["data_split"] for lines in validations.values() for line in lines} == {
        "train-held-out-0.3-seed-0"
    }
    finite = [name for name in RATES if name != "c03"]
    first = sorted(finite, key=lambda name: -validations[name][0]["top1"])
    assert set(names[4:6]) == set(first[:2])
    second = max(first[:2], key=lambda name: validations[name][1]["top1"])
    values = json.loads((output / "report.json").read_text())
    assert values["chosen"] == second
    assert set(values["commands"]) == {*(f"{name}-seed0" for name in RATES), "final-seed0"}
    assert len(values["environments"]) == 1
    assert names[6] == "final"

    # The winner is trained on all 47 samples, and the 23 of val are looked at once.
    (only,) = tiny.metrics(output / "final-seed0", "val")
    assert (only["step"], only["samples"], "data_split" in only) == (15, 23, False)
    assert values["final"]["final-seed0"]["top1"] == only["top1"]
    report = (output / "report.md").read_text()
    assert f"| {second} | {RATES[second]:g} |" in report
    assert "| c03 | 1e+30 |  |  | not finite before epoch 1 |" in report
    assert report.count("**chosen**") == 1
    right = validations[first[0]][0]["top1"] / 100
    error = 100 * math.sqrt(right * (1 - right) / validations[first[0]][0]["samples"])
    assert f" % is ± {error:.2g} points" in report
    assert f"top-1 **{only['top1']:.2f}** % on the 23 samples of the validation split" in report
    assert (output / "report.png").stat().st_size > 10_000
    # The summary of the folder has no row of a search.
    assert "report.md" not in summary.write(output).read_text()

    # Through rungs it is the run that it would have been at once.
    straight = search.Search(search.read(file), output, (), ())
    straight.candidates["straight"] = {"phases.0.optimizer.lr": RATES[second]}
    run = straight.run("straight", 0, 2)
    _, config, *overrides = run.arguments
    assert main(config, *overrides).status == 0
    both = run.folder, output / f"{second}-seed0"
    for kind in ("train", "val"):
        straight_lines, halved_lines = (tiny.metrics(folder, kind) for folder in both)
        assert straight_lines == halved_lines
    ours, theirs = (load_file(tiny.newest(folder) / "model.safetensors") for folder in both)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []

    # Nothing is left to do.
    trained = len(here.started)
    assert call(*arguments)[0] == 0
    assert len(here.started) == trained
    # A later change that would give another winner is reported.
    (other,) = {*first[:2]} - {second}
    with (output / f"{other}-seed0" / "metrics.jsonl").open("a") as metrics:
        print(json.dumps({"kind": "val", "step": 8, "top1": 100.0}), file=metrics)
    status, printed = call(*arguments)
    assert status == 2
    evaluated = "another candidate was already evaluated on the validation split"
    assert f"{other} is best now, but {evaluated}" in printed


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"from": 0.01, "to": 1, "number": 5, "log": True}, [0.01, 0.0316, 0.1, 0.316, 1.0]),
        ({"from": 0, "to": 0.3, "number": 4}, [0.0, 0.1, 0.2, 0.3]),
        ([[1, 2], "a", None], [[1, 2], "a", None]),
    ],
)
def test_values_of_an_axis(write, axis, values):
    over = {"loss.phi": axis, "loss.kind": ["sdt", "tet"]}
    found = search.read(write({"over": over})).search
    assert found.axes == {"loss.phi": values, "loss.kind": ["sdt", "tet"]}
    combined = [tuple(one.values()) for one in found.candidates.values()]
    assert combined == [(value, kind) for value in values for kind in ("sdt", "tet")]


def test_ties_and_losses_are_ranked():
    scores = {"a": [1.0, 3.0], "b": [2.0, 2.0], "c": [], "d": [1.0, 2.0]}
    assert search.Rung(1, scores, "top1").ranked == ["a", "b", "d", "c"]
    assert search.Rung(1, scores, "loss").ranked == ["d", "a", "b", "c"]


def test_the_best_at_the_end_of_three_values_or_more_is_reported():
    axes = {"lr": [0.1, 0.2, 0.3], "phi": [1, 2], "kind": ["a", "b", "c"], "micro": [1, 2, 4]}
    best = {"lr": 0.3, "phi": 1, "kind": "a", "micro": 2}
    of = SimpleNamespace(axes=axes)
    made = SimpleNamespace(study=SimpleNamespace(search=of), candidates={"c1": best})
    text = search_report.at_the_edge(made, search.Standing([], "c1"))
    beyond = "a better one may be outside the range."
    assert text == f"`lr`: 0.3 is the largest value that was tried; {beyond}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search.rungs": [2, 1]}, "search.rungs: [2, 1] must ascend"),
        ({"search.rungs": [1, 2, 3]}, "only one candidate reaches epoch 3"),
        ({"search.rungs": [1, 4]}, "search.rungs: 4 exceeds the 3 epochs"),
        ({"search.eta": 1}, "'search.eta': must be 2 or more"),
        ({"search.held": 0.1}, "unknown key 'search.held'; did you mean 'search.held_out'?"),
        ({"search.metric": "top5"}, "'search.metric'"),
        ({"over": {"phases.0.optimizer.lrr": [1.0, 2, 3, 4]}}, "c01 (phases.0.optimizer.lrr=1.0)"),
        ({"over": {"loss.phi": []}}, "'search.over.loss.phi'"),
        ({"over": {"loss.phi": {"from": 0, "to": 1}}}, "'search.over.loss.phi.number' is missing"),
        ({"over": {"loss.phi": {"from": 0, "to": 1, "number": 3, "log": True}}}, "above 0"),
        ({"over": {"non_finite_limit": [1, 2, 3]}}, "non_finite_limit is also in overrides"),
        ({"over": {"seed": [1, 2, 3, 4]}}, "the study itself sets seed"),
        ({"overrides": {"max_steps": 3}}, "the study itself sets max_steps; set search.rungs"),
        ({"overrides": {"data.root": "nowhere"}}, "nowhere"),
        ({"entries": {}}, "unknown key 'entries'"),
    ],
)
def test_mistakes_in_a_search_are_named(call, write, tmp_path, changes, words):
    status, output = call("study", write(changes), "--output", tmp_path / "out")
    assert (status, output.count("\n")) == (2, 1), output
    assert words in output
    assert not (tmp_path / "out").exists()


def test_flags_that_a_search_does_not_take(call, write, tmp_path):
    file = write()
    for arguments, words in (
        (("--only", "c01"), "--only: "),
        (("--slurm", "--time", "1:00:00"), "--slurm: "),
        (("phases.0.optimizer.lr=0.1",), "phases.0.optimizer.lr is a searched key"),
    ):
        status, output = call("study", file, "--output", tmp_path / "out", *arguments)
        assert (status, words in output) == (2, True), output


def test_the_searches_of_the_project_resolve(tmp_path, monkeypatch):
    # Elsewhere than in the checkout, where `make quickstart` may have left the data.
    monkeypatch.chdir(tmp_path)
    found = [file for file in sorted(STUDIES_DIR.glob("*.yaml")) if search.is_search(file)]
    assert found
    for file in found:
        made = search.Search(search.read(file), tmp_path, (), ())
        with pytest.raises(UserError, match=r"data\.root"):
            made.check_inputs()
