"""Evaluation of networks with neurons other than LIF."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from kernel_runs import randomize

from tetdist.apps.reports.evaluation_page import as_text, html_page
from tetdist.data.loader import Batch
from tetdist.errors import UserError
from tetdist.evaluation.evaluate import Evaluator, evaluate
from tetdist.evaluation.results import Subject
from tetdist.evaluation.suite import run_suite
from tetdist.nn import neurons
from tetdist.nn.neurons import LIF

CLASSES = ("a", "b", "c", "d")


@dataclass(frozen=True, kw_only=True)
class Ahead(LIF):
    """Every timestep sees the mean of all timesteps' currents; any T will do."""

    causal: ClassVar[bool] = False

    def run(self, current, membrane, **parameters):
        grown = torch.arange(1, len(current) + 1).view(-1, *(1,) * (current.ndim - 1))
        return neurons.run(current + (current * grown).mean(0), self, membrane, **parameters)


@pytest.fixture(autouse=True)
def ahead(monkeypatch):
    monkeypatch.setitem(neurons.NEURONS, "ahead", Ahead)


def network(name, neuron, **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, neuron=neuron, **arguments)
    randomize(model)
    return model.double().eval()


def small(neuron):
    return network("spiking_convnet", neuron, channels=(6, 8, 8), input_size=12)


@dataclass(frozen=True)
class OneBatch(Evaluator):
    """Evaluates a batch in place of a folder's."""

    batch: Batch

    def run(self, _title, also=lambda _logits, _labels: None):
        options = {"precision": "fp64", "also": also}
        return evaluate(self.model, [self.batch], len(self.batch.labels), self.world, **options)


def evaluator_of(model, world):
    generator = torch.Generator().manual_seed(0)
    index = type("Index", (), {"classes": CLASSES})
    config = None
    images = torch.randn(24, 3, 12, 12, generator=generator, dtype=torch.float64)
    batch = Batch(images, torch.arange(24) % 4, np.arange(24))
    return OneBatch(model, config, index, world, lambda: None, batch)


def subject(trained, reported):
    at = {"trained_timesteps": trained, "reported_timesteps": reported}
    return Subject(checkpoint="x", model="m", step=1, split="val", **at)


def test_what_is_not_causal_is_evaluated_at_each_t_by_itself(alone):
    model = small({"kind": "ahead"})
    evaluator = evaluator_of(model, alone)
    result = run_suite(evaluator, subject(2, [1, 2, 4]))
    images, labels = evaluator.batch.images, torch.arange(24) % 4
    losses = []
    with torch.no_grad():
        for t in (1, 2, 4):
            model.set_timesteps(t)
            losses.append(torch.nn.functional.cross_entropy(model(images), labels).item())
        first_two = model(images, per_timestep=True)[:2].mean(0)
    got = result.evaluation.per_timestep_loss
    assert [got[0], got[1], got[3]] == pytest.approx(losses)
    assert got[2] is None
    # One pass at the largest T would give another result.
    other = torch.nn.functional.cross_entropy(first_two, labels).item()
    assert abs(other - losses[1]) > 1e-3
    assert (result.evaluation.timesteps, result.evaluation.loss) == (2, got[1])
    assert result.early_exit is None
    for text in (as_text(result), html_page(result)):
        assert "the network is not causal" in text


class Outside(torch.nn.Module):
    """No class of tetdist: logits that grow with time, of (B, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.timesteps, self.num_classes, self.input_kind = 3, len(CLASSES), "images"
        self.conv = torch.nn.Conv2d(3, len(CLASSES), 3).double()

    def set_timesteps(self, timesteps):
        self.timesteps = timesteps

    def forward(self, x, per_timestep=False):
        assert per_timestep, "no other call is allowed"
        means = self.conv(x).mean((2, 3))
        return torch.stack([t * means for t in range(1, self.timesteps + 1)])


def test_of_a_network_from_outside_all_but_what_is_known_of_ours_is_reported(alone):
    model = Outside()
    evaluator = evaluator_of(model, alone)
    result = run_suite(evaluator, subject(3, [1, 3]))
    with torch.no_grad():
        logits = model(evaluator.batch.images, per_timestep=True)
    right = (logits.mean(0).argmax(-1) == evaluator.batch.labels).double().mean()
    assert result.evaluation.top1 == pytest.approx(100 * float(right))
    assert (result.operations, result.evaluation.firing_rate) == (None, {})
    for text in (as_text(result), html_page(result)):
        assert "operations are only counted for" in text
    for shape in ((24, 4), (2, 24, 4), (3, 23, 4)):
        model.forward = lambda *_, shape=shape, **__: torch.zeros(shape)
        words = rf"returned {re.escape(str(shape))} .* must return logits \(3, 24, cl"
        with pytest.raises(UserError, match=words):
            run_suite(evaluator, subject(3, [3]))


def test_a_training_says_of_what_is_not_causal_only_the_whole(alone):
    evaluator = evaluator_of(small({"kind": "psn"}), alone)
    result = evaluator.run("evaluate")
    assert result.timesteps == 4
    assert result.per_timestep_top1 == result.per_timestep_loss == []
    # The network is left as it was.
    evaluator.model.train()
    assert evaluator.run("evaluate") == result
    assert all(one.training and not one._forward_hooks for one in evaluator.model.modules())
    assert evaluator_of(small({"kind": "masked_psn"}), alone).run("").per_timestep_top1 != []


@pytest.mark.parametrize(
    ("name", "kind", "arguments", "most"),
    [
        ("spiking_convnet", "lif", {"channels": (6, 8, 8), "input_size": 12}, 1),
        ("spiking_convnet", "ilif", {"channels": (6, 8, 8), "input_size": 12}, 4),
        ("sew_resnet18", "ilif", {"width": 4}, 20),  # a stage adds up
        ("vggsnn", "nilif", {"input_size": 16, "timesteps": 4}, 16),  # means of four
        (
            "espikeformer_t",
            "nilif",
            {"widths": (4, 4, 4, 6), "depths": (1, 1), "heads": 2, "timesteps": 4},
            4,
        ),
    ],
)
def test_integer_spikes_give_the_same_logits_as_spikes_of_0_and_1(name, kind, arguments, most):
    """A device runs a timestep as sub-timesteps, whose currents the next layer adds up."""
    numbers = {"threshold": 0.3} | ({} if kind == "lif" else {"most_spikes": 4})
    model = network(name, {"kind": kind, **numbers}, **arguments)
    shape = (1, 4, 2, 16, 16) if model.input_kind == "events" else (2, 3, 12, 12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = {"vggsnn": 16, "espikeformer_t": 4}.get(name, 1)  # spikes that a 1 stands for
    sub_timesteps = []

    def binary(convolve):
        def forward(x):
            counts = x * levels
            assert torch.equal(counts, counts.round().abs())
            spikes = [(counts > n).double() for n in range(int(counts.max()))]
            sub_timesteps.append(len(spikes))
            bias = convolve(torch.zeros_like(x))
            return bias + sum(convolve(one) - bias for one in spikes) / levels

        return forward

    with torch.no_grad():
        expected = model(x, per_timestep=True)
        for layer, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d) and not layer.startswith("stem"):
                module.forward = binary(module.forward)
        torch.testing.assert_close(model(x, per_timestep=True), expected, rtol=1e-12, atol=1e-12)
    assert expected.std() > 1e-3
    assert min(most, 3) <= max(sub_timesteps) <= most


@pytest.mark.parametrize("kind", ["ilif", "nilif"])
def test_firing_rates_of_integer_spikes_are_shares_of_the_most(kind, alone):
    model = small({"kind": kind, "most_spikes": 8, "threshold": 0.3})
    seen = []
    model.stem.neuron.register_forward_hook(lambda _m, _i, output: seen.append(output))
    result = evaluator_of(model, alone).run("evaluate")
    spikes = seen[0] / (8 if kind == "ilif" else 1)
    assert 0.1 < result.firing_rate["stem.neuron"] < 1
    assert result.firing_rate["stem.neuron"] == pytest.approx(spikes.mean().item())
