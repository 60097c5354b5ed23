"""tools/compare_runs.py reports where runs differ, and no difference where there is none."""

import json
import math
from functools import partial

import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file
from samples import pixels

from tetdist.apps.reports import style

A, B = "a", "b"


@pytest.fixture
def run_tool(tool):
    return partial(tool, "compare_runs")


def lines():
    """Ten steps with an evaluation at every fifth."""
    found = {}
    for step in range(1, 11):
        common = {"step": step, "time": 1.0, "epoch": step / 5, "phase": 0}
        speed = {"samples_per_s": 1.0, "data_wait": 0.0}
        found["train", step] = common | speed | {"loss": 1 / step, "lr": 0.1, "top1": 9.0}
        if step % 5 == 0:
            values = {"top1": 10.0 * step, "loss": 1.0, "seconds": 1.0, "firing_rate": {"sn": 0.25}}
            values |= {"timesteps": 4, "per_timestep_top1": [40.0, 50.0]}
            found["val", step] = common | values
    found["train", 9] |= {"grad_norm": "NaN", "loss": "Infinity"}  # which equal themselves
    return found


def make_run(folder, changes=None, *, weights=(), **configuration):
    """A run whose lines of some (kind, step) have other values; None: without the line.

    Of its ``weights``, by step, each checkpoint has one tensor, or none, beside another.
    """
    folder.mkdir()
    found = lines()
    for place, change in (changes or {}).items():
        bare = {"step": place[1], "time": 1.0, "epoch": 2.2}
        found[place] = None if change is None else bare | found.get(place, {}) | change
    written = [line | {"kind": kind} for (kind, _), line in found.items() if line is not None]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    values = {"name": folder.name, "seed": 0, "loss": {"kind": "tet"}, "phases": [{"epochs": 4}]}
    values |= configuration
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    for name, weight in dict(weights).items():
        place = folder / "checkpoints" / name
        place.mkdir(parents=True)
        about = {"config": {}, "classes": None, "timesteps": 1, "step": 1}
        own = {"weight": torch.tensor(weight)} if weight else {}
        tensors = own | {"other": torch.ones(3)}
        save_file(tensors, place / "model.safetensors", {"tetdist": json.dumps(about)})
    return folder


@pytest.fixture
def compared(run_tool, tmp_path):
    """Compares a run with one of other lines: status and output, each word separated by a space."""

    def compare_with(changes):
        a = tmp_path / A if (tmp_path / A).exists() else make_run(tmp_path / A)
        b = make_run(tmp_path / f"b{len(list(tmp_path.iterdir()))}", changes)
        status, printed, _ = run_tool(a, b)
        assert all(len(line) <= 100 for line in printed.splitlines())
        return status, " ".join(printed.split())

    return compare_with


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Only the clock.
        ({("train", 3): {"time": 2.0, "samples_per_s": 3.0}, ("val", 5): {"seconds": 9.0}}, ""),
        ({("train", 6): {"slowest_host": "n", "slowest": {"rank": 3}, "eta_s": 5}}, ""),
        ({("val", 5): {"timesteps": 2}, ("train", 7): {"lr": 0.2}}, ""),  # settings
        # The first step with another value, its values, and the largest difference.
        (
            {("train", 4): {"loss": math.nextafter(0.25, 1)}, ("train", 7): {"top1": 4.5}},
            "they first differ at step 4. a b train/loss 0.25 0.25000000000000006 "
            "largest relative difference: 0.5 (train/top1 at step 7)",
        ),
        ({("val", 10): {"per_timestep_top1": [40.0, 25.0]}}, "val/top1_t2 50 25 "),
        ({("val", 10): {"firing_rate": {"sn": 0.5, "b": 1.0}}}, "ce: 0.5 (val/firing_rate/sn at"),
        ({("train", 6): {"loss": "NaN"}}, "nan largest relative difference: inf"),
        ({("train", 6): {"loss": None}}, "the same values where both have one. Weights"),
        # Steps that one run lacks.
        (
            {("train", 2): None, ("train", 9): None, ("val", 11): {"top1": 1.0, "loss": 1.0}},
            "the same in 10 common lines. only a has 2 lines, the first at step 2 (train) "
            "only b has 1 line, the first at step 11 (val)",
        ),
        (dict.fromkeys(lines()) | {("val", 11): {"top1": 1.0}}, "no common step. only a has 12 "),
    ],
)
def test_where_metrics_differ(changes, expected, compared):
    status, printed = compared(changes)
    assert status == bool(expected)
    assert (expected or "Metrics of a and b: the same in 12 common lines.") in printed
    assert printed.endswith("The runs differ." if expected else "The runs are the same.")


def test_results_and_differing_keys(run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worse = {("val", 10): {"top1": 20.0, "epoch": 4.0, "samples": 9, "data_split": "-held-out-"}}
    worse |= {("train", 10): {"epoch": 4.0}, ("final", 10): {"epoch": 4.0}}
    average = {("val_ema", step): {"top1": 7.0 * step, "epoch": step / 5} for step in (5, 10)}
    average["val", 10] = {"samples": 8, "timesteps": 2}
    make_run(tmp_path / A, worse, model={})
    make_run(tmp_path / B, average, loss={"kind": "sdt"}, seed=1)
    ended = {("val", 5): None, ("val", 10): None, ("final", 10): {"epoch": 2.0}}
    make_run(tmp_path / "c", ended, seed=1, phases=[{"epochs": 4, "timesteps": None}])
    make_run(tmp_path / "bare", dict.fromkeys(lines()))
    status, printed, _ = run_tool(".")  # the runs in a folder
    assert status == 1
    assert printed.startswith("Left out: bare has no metrics yet.\n  ")
    rows = [line.split() for line in printed.splitlines()]
    assert ["a", A, "4", "4", "held-out", "20.00", "40.00", "50.00", "1"] in rows
    assert ["b", B, "2", "2", "100.00", "40.00", "100.00", "2"] in rows
    assert ["its", "moving", "average", "2", "-", "70.00", "-", "70.00", "2"] in rows
    assert ["c", "c", "-", "-", "-", "-", "-", "-"] in rows
    assert "\nEvaluated on different data: top-1 is not comparable.\n" in printed
    assert "\nTrained for different numbers of epochs (a: 4; c: 2): top-1 is not " in printed
    # Another name is no difference, and equal keys are left out.
    assert "Configuration: 3 different keys.\n" in printed
    assert "\n  seed                a: 0; b, c: 1\n" in printed
    assert "\n  loss.kind           a, c: tet; b: sdt\n" in printed
    assert "\n  phases.0.timesteps  a, b: absent; c: null\n" in printed
    (left,) = [line for line in printed.splitlines() if line.startswith("Not finished: b")]
    assert left == "Not finished: b is broken off at step 10 of 20."
    assert printed.endswith("\n\nMetrics and weights: different in all runs.\n\nThe runs differ.\n")
    for names, same in (("aba", "a, c"), ("abcbc", "b, d; in c, e"), ("bbb", "a, b, c")):
        status, printed, _ = run_tool(*names, "mlartifacts", "mlflow.db")  # as runs/* gives
        assert ("  a: 0; others: 1\n" in printed) == (names == "abcbc")  # seed
        assert f"\n\nMetrics and weights: the same in {same}.\n" in printed
        assert status == ("Another seed alone" in printed) == (names != "bbb")


def test_a_key_that_an_older_version_lacks_has_its_default_and_a_long_value_is_wrapped(
    run_tool, tmp_path
):
    written = tiny.changed(tiny.CONFIG, {"data.root": "x"}) | {"seed": 0}
    del written["log_every"]
    a = make_run(tmp_path / A, **written)
    b = make_run(tmp_path / B, **written | {"log_every": 20, "init_checkpoint": "x" * 300})
    printed = run_tool(a, b)[1]
    assert "Configuration: 1 different key.\n  init_checkpoint  a: null; b:" in printed
    assert all(len(line) <= 100 for line in printed.splitlines())
    assert printed.count("x") >= 300
    drawn = [written["phases"][0] | {"timesteps": {"from": 1, "to": 3}}]
    other = make_run(tmp_path / "drawn", **written | {"phases": drawn})
    printed = run_tool(a, other)[1]
    assert "1 different key.\n  phases.0.timesteps  a: 2; b: 1 to 3\n" in printed


FIVE_TEN = {"step-05": [1.0], "step-10": [0.0]}
FIVE_SIX, IDENTICAL = {"step-05": [1.0], "step-06": [0.0]}, "at step 5: bitwise identical."


@pytest.mark.parametrize(
    ("ours", "theirs", "status", "expected"),
    [
        # Of each step the last checkpoint counts; of the steps the last common one.
        ({"step-05": [5.0], "step-05.1": [1.0], "step-10": [2.0]}, FIVE_SIX, 0, IDENTICAL),
        ({**FIVE_TEN, "step-10": [1.0]}, FIVE_TEN, 1, "at step 10: 1 of 2 tensors differ."),
        ({"step-05": [math.nan]}, {"step-05": [math.nan]}, 0, IDENTICAL),
        ({"step-05": [0.0]}, {"step-05": [-0.0]}, 1, "at step 5: 1 of 2 tensors differ."),
        ({"step-05": [0.0]}, {"step-05": [0.0, 0.0]}, 1, "at step 5: 1 of 2 tensors differ."),
        ({"step-05": []}, {"step-05": [0.0]}, 1, "at step 5: 1 of 2 tensors differ."),
        ({"step-05": [0.0]}, {"step-06": [1.0]}, 0, ": no checkpoint of the same step."),
    ],
)
def test_weights_of_the_last_common_checkpoint(ours, theirs, status, expected, run_tool, tmp_path):
    runs = make_run(tmp_path / A, weights=ours), make_run(tmp_path / B, weights=theirs)
    found, printed, _ = run_tool(*runs)
    assert found == status
    assert f"Weights of a and b{' ' if expected[0] == 'a' else ''}{expected}" in printed
    assert printed.endswith("The runs differ.\n" if status else "The runs are the same.\n")


def test_the_plot_has_a_colour_for_each_run(run_tool, tmp_path):
    runs = [
        make_run(tmp_path / name, {("val", step): {"top1": float(i + step)} for step in (5, 10)})
        for i, name in enumerate("abc")
    ]
    out = tmp_path / "all.png"
    status, printed, _ = run_tool(*runs[:2], "--plot", out)
    assert (status, printed.splitlines()[-1]) == (1, f"wrote {out}")
    first, second, third = (pixels(out, colour) for colour in style.SERIES[:3])
    assert min(first, second) > 300
    assert third == 0
    run_tool(*runs, "--plot", out)
    assert pixels(out, style.SERIES[2]) > 300


def test_mistakes_end_in_one_sentence(run_tool, tmp_path):
    a, b = make_run(tmp_path / A), make_run(tmp_path / B)
    empty, bare = make_run(tmp_path / "empty", dict.fromkeys(lines())), make_run(tmp_path / "bare")
    (bare / "metrics.jsonl").unlink()
    (b / "metrics.jsonl").write_text("{\n")
    for arguments, expected in (
        ((a, b), f"{b}/metrics.jsonl: line 1 is damaged"),
        ((empty, bare), "error: there is no run with metrics; name two or more that have some"),
        ((a, bare), f"error: there is only the run {a} with metrics; name two or more"),
    ):
        status, _, errors = run_tool(*arguments)
        assert (status, errors.count("\n")) == (2, 1)
        assert expected in errors
