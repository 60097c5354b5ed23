"""Phases with rounded weights: their steps, runs, checkpoints, and what is refused."""

import copy
import json
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import expect, refused
from torch import Tensor, nn

from tetdist.apps.weights.trained import load
from tetdist.config.loading import load as load_config
from tetdist.config.loading import parse
from tetdist.datasets.index import index_file, load_index
from tetdist.distributed.world import join
from tetdist.nn import batch_norm
from tetdist.nn.rounding import rounded_weights
from tetdist.optimizers import make_optimizer
from tetdist.storage import checkpoint
from tetdist.training import teacher
from tetdist.training.engines import base, create
from tetdist.training.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")
LR, STD = 0.05, (0.229, 0.224, 0.225)
PSN = {"name": "psn_sew_resnet18", "arguments": {}, "neuron": {"timesteps": 2}}


def by_hand(key: str, weight: Tensor) -> Tensor:
    """A weight of the tiny network, by its name, rounded with numpy; others as they are."""
    if not key.endswith(("conv.weight", "fc.weight")):
        return weight
    std = np.array(STD).reshape(3, 1, 1) if key == "stem.conv.weight" else 1.0
    weights = weight.double().numpy() / std
    rows = weights.reshape(1 if key == "fc.weight" else len(weight), -1)
    scales = np.abs(rows).max(1, keepdims=True) / (63 if key == "stem.conv.weight" else 127)
    rounded = (np.rint(rows / scales) * scales).reshape(weight.shape) * std
    return torch.from_numpy(rounded).to(weight.dtype)


def test_gradients_of_rounded_weights_change_the_float_weights():
    phase = {"epochs": 1, "timesteps": 2, "quantize": True}
    phase["optimizer"] = {"kind": "sgd", "lr": LR, "momentum": 0.0}
    changes = {"name": "x", "data.root": "d", "engine": "torch", "phases": [phase]}
    config = parse(tiny.changed(tiny.CONFIG, changes), "x")
    torch.manual_seed(0)
    given: dict[str, Any] = {"channels": (4, 8), "input_size": 16, "num_classes": 4}
    model = timm.create_model("spiking_convnet", timesteps=2, **given).train()
    model.set_execution("reference")
    batch_norm.defer_running_statistics(model)
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    before = copy.deepcopy(model.state_dict())
    gradients = []
    for of in (by_hand, lambda _, weight: weight):
        one = copy.deepcopy(model)
        one.load_state_dict({key: of(key, value) for key, value in before.items()})
        F.cross_entropy(one(images, per_timestep=True).mean(0), labels).backward()
        gradients.append({key: value.grad for key, value in one.named_parameters()})
    assert not torch.equal(gradients[0]["fc.weight"], gradients[1]["fc.weight"])
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"kind": "sdt"})})
    with join("cpu") as world:
        optimizer = make_optimizer(model, config.phases[0].optimizer)
        engine = create.make_engine(base.EngineParts(config, model, optimizer, 1, world))
        Step(config, model, engine, world, [0]).take(0, [(images, labels)], LR)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value, before[key] - LR * gradients[0][key])


def test_weights_return_to_their_memory_after_an_interruption():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 0  # a channel without a scale
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}

    def interrupted() -> None:
        with rounded_weights(model, ()):
            assert not torch.equal(model[0].weight, before["0.weight"][1])
            assert all(value.isfinite().all() for value in model.state_dict().values())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0]
        assert torch.equal(value, before[key][1])


@pytest.mark.parametrize("last", [True, False])
def test_checkpoints_of_a_phase_are_evaluated_and_exported_as_it_trains(
    last, main, call, tiny_config, tmp_path
):
    optimizer = {"kind": "adam", "lr": 0.01}
    phases = [
        {"epochs": 1, "timesteps": 2, "quantize": not last, "optimizer": optimizer},
        {"epochs": 1, "timesteps": 2, "quantize": last, "optimizer": "continue"},
    ]
    expect(main(tiny_config({"phases": phases, "ema.decay": 0.8})))
    run = tmp_path / "runs" / "tiny"
    for folder, quantize in zip(
        sorted(run.glob("checkpoints/step-*")), (not last, last), strict=True
    ):
        assert checkpoint.load_model_file(folder)[1].quantize == quantize
        for flags, kind, name in (((), "val", "model"), (("--ema",), "val_ema", "ema")):
            file = load_file(folder / f"{name}.safetensors")
            model = load(folder, ema=bool(flags)).model
            for key, value in model.state_dict().items():
                assert torch.equal(value, by_hand(key, file[key]) if quantize else file[key]), key
            assert not torch.equal(by_hand("fc.weight", file["fc.weight"]), file["fc.weight"])
            (line,) = (
                one for one in tiny.metrics(run, kind) if one["step"] == int(folder.name[-8:])
            )
            options = ("--execution", "reference", "--device", "cpu", "--json", tmp_path / "e.json")
            status, output = call("eval", "--checkpoint", folder, *flags, *options)
            assert status == 0, output
            found = json.loads((tmp_path / "e.json").read_text())
            assert (found["top1"], found["loss"]) == (
                line["top1"],
                pytest.approx(line["loss"], rel=1e-6),
            )
    output = tmp_path / "given"
    assert call("export", run, "--format", "safetensors", "--output", output)[0] == 0
    given, weights = load_file(output / "model.safetensors"), load(run).model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in given.items())
    assert all(
        torch.equal(value, given[key]) for key, value in load(output).model.state_dict().items()
    )
    config = load_config(str(run / "config.yaml"), [])
    index = load_index(index_file(config.data.index_dir, "val"))
    as_teacher = teacher._from_checkpoint(run, config, index)[0].state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in as_teacher.items())
    assert "weights rounded to int8" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "preact_resnet18", "arguments": {}}, "preact_resnet18 is a PreActResNet, and"),
        (PSN, "is a PSNSEWResNet, and --int8 takes SEW-"),
        ({"neuron": {"kind": "psn", "timesteps": 2}}, "has psn neurons without whole numbers"),
    ],
)
def test_networks_without_whole_numbers_are_refused(changes, words, main, tiny_config):
    model = {f"model.{key}": value for key, value in changes.items()}
    outcome = main(tiny_config(model | {"phases.0.quantize": True}))
    refused(outcome, "phases.0.quantize: ", words, "; set it to false")
