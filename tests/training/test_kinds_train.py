"""Whole runs with each kind of neuron, which learns."""

import json

import pytest
import tiny
from safetensors.torch import load_file
from tiny import expect

from tetdist.apps.cli import eval as eval_command

KINDS = {
    "plif": {"kind": "plif", "threshold": 0.5},
    "psn": {"kind": "psn", "timesteps": 2},
}
LEARNT = {"plif": ["w"], "psn": ["bias", "weight"]}
SET_BY = {
    "plif": "model.neuron.kind=plif has other defaults than spiking_convnet's own "
    "neuron: surrogate=sigmoid, not triangle, surrogate_width=4.0, not 1.0, "
    "fires_at_threshold=true, not false\n",
    "psn": "surrogate=atan, not triangle, surrogate_width=2.0, not 1.0",
}


def changes(neuron):
    phase = {"epochs": 8, "timesteps": 2, "optimizer": {"kind": "sgd", "lr": 0.05}}
    phase["optimizer"]["weight_decay"] = 0.01
    return {
        "model.neuron": neuron,
        "phases": [phase],
        "evaluate_every": 8,
        "execution": "fused",
        "recompute": "blocks",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind, main, tiny_config, tmp_path):
    text = expect(main(tiny_config(changes(KINDS[kind]))))
    assert SET_BY[kind] in text
    run = tmp_path / "runs/tiny"
    (val,) = tiny.metrics(run, "val")
    assert val["top1"] > 50  # chance is 25 %
    # What the neurons learn is in the checkpoint, and has moved.
    weights = load_file(tiny.newest(run) / "model.safetensors")
    learnt = {
        key: value for key, value in weights.items() if key.startswith("stem.neuron.learned.")
    }
    assert [key.rpartition(".")[2] for key in sorted(learnt)] == LEARNT[kind]
    begins = {"w": 0.0, "bias": -KINDS[kind].get("threshold", 1.0)}
    for key, value in learnt.items():
        first = begins.get(key.rpartition(".")[2])
        assert first is None or (value != first).all(), key


def test_an_evaluation_refuses_the_t_that_does_not_exist(main, tiny_config, tmp_path, capfd):
    file = tiny_config(changes(KINDS["psn"]) | {"phases.0.epochs": 1})
    expect(main(file))
    run, found = tmp_path / "runs/tiny", tmp_path / "found.json"
    assert eval_command.main(["--checkpoint", str(run), "--timesteps", "1,2"]) == 2
    assert (
        "timesteps: psn cannot run 1 timestep: it has weights for T=2 only; leave it out"
        in capfd.readouterr().err
    )
    assert eval_command.main(["--checkpoint", str(run), "--json", str(found)]) == 0
    values = json.loads(found.read_text())
    assert values["reported_timesteps"] == [2]
    assert values["per_timestep_top1"] == [None, values["top1"]]
    assert values["top1"] == tiny.metrics(run, "val")[-1]["top1"]
