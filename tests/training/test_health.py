"""Steps that are not finite: counted on the device, and examined layer by layer."""

import math

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from tiny import expect

import tetdist.models  # registers them
from tetdist.apps.reports.run_plots import FiringWatch
from tetdist.nn.batch_norm import BatchNorm, defer_running_statistics
from tetdist.training.health import NonFiniteSteps, examine
from tetdist.training.step import LOSS, Step

assert tetdist.models


def counted(answers):
    """Count a string of steps; x is a skipped one."""
    steps = NonFiniteSteps(torch.device("cpu"))
    for i, answer in enumerate(answers, start=1):
        steps.record(i, torch.tensor(answer != "x"))
    return steps


@pytest.mark.parametrize(
    ("answers", "reached_at"),
    [("", 0), ("xxxx", 0), ("xxxx.x.xxxx", 0), ("xxxxx", 5), (".xxxxxx.xxxxx", 6)],
)
def test_too_many_are_so_many_in_a_row(answers, reached_at):
    """Also if the row ended before the check: the step is the one that reached the limit."""
    assert counted(answers).limit_reached_at == reached_at


def test_count_goes_on_after_a_stop():
    first = counted("xxxx")
    second = NonFiniteSteps(torch.device("cpu"))
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    second.record(5, torch.tensor(False))
    assert second.limit_reached_at == 5
    assert second.new() == 5


def network():
    torch.manual_seed(0)
    model = timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=2
    )
    defer_running_statistics(model)
    return model.train()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(2, 3, 16, 16, generator=generator), torch.tensor([0, 3])) for _ in range(2)]


@pytest.mark.parametrize(
    ("layer", "first"), [("stem.conv", "stem.conv"), ("blocks.0.conv", "blocks.0.conv"), ("", None)]
)
def test_examination_names_the_first_layer(layer, first):
    model = network()
    if layer:
        model.get_submodule(layer).weight.data[0] = math.inf
    found = examine(model, batches(), lambda x, y: F.cross_entropy(model(x), y))
    assert found.first == first
    assert found.is_finite == (first is None)
    assert len(found.losses) == 2
    norms = [norm for _, norm in found.weights]
    if first:
        assert not math.isfinite(found.gradients[0][1])
        assert found.weights[0] == (f"{layer}.weight", math.inf)
        assert f"the first layer with a non-finite output is {first}" in str(found)
    else:
        assert norms == sorted(norms, reverse=True)
        assert "not finite" not in str(found)


def test_examination_sees_the_gradients_of_the_step():
    model = network()
    found = dict(examine(model, batches(), lambda x, y: F.cross_entropy(model(x), y)).gradients)
    sum(F.cross_entropy(model(x), y) for x, y in batches()).backward()
    for name, parameter in model.named_parameters():
        assert found[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)


def test_examination_changes_nothing():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    examine(model, batches(), lambda x, y: F.cross_entropy(model(x), y))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m.pending_count for m in model.modules() if isinstance(m, BatchNorm))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_step_is_examined_as_it_was_taken(main, tiny_config, monkeypatch):
    """With the T and the dropped features that it drew."""
    take, examined = Step.take, []

    def examine_and_take(self, step, batches, lr):
        batches = list(batches)
        examined.append(self.examine(step, batches).losses)
        update, sums = take(self, step, batches, lr)
        assert 2 * sum(examined[-1]) == pytest.approx(sums[LOSS].item(), rel=1e-6)
        return update, sums

    monkeypatch.setattr(Step, "take", examine_and_take)
    changes = {"model.arguments.drop_rate": 0.3, "phases.0.timesteps": [1, 3]}
    expect(main(tiny_config(changes | {"phases.0.epochs": 1, "engine": "torch"})))
    assert len(examined) == tiny.STEPS_PER_EPOCH


def test_layers_are_named_when_they_change():
    watch = FiringWatch()
    assert watch.changes({"a": 0.1, "b": 0.2, "c": 0.3}) == []
    assert watch.changes({"a": 0.0005, "b": 0.95, "c": 0.0}) == [
        "dead layers, firing below 0.1 %: a (0.05 %), c (0 %)",
        "saturated layers, firing above 90 %: b (95 %)",
    ]
    assert watch.changes({"a": 0.0002, "b": 0.96, "c": 0.0}) == []
    assert watch.changes({"a": 0.2, "b": 0.0, "c": 0.0}) == [
        "layers that fire again: a (20 %)",
        "dead layers, firing below 0.1 %: b (0 %)",
    ]
    assert FiringWatch().changes({"a": 0.0}) == ["dead layers, firing below 0.1 %: a (0 %)"]
