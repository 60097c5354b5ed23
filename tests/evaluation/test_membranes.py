"""Membranes of a batch: against neurons done by hand, and against the spikes of the network."""

import pytest
import timm
import torch
from torch import nn

import tetdist
from tetdist.evaluation import membranes
from tetdist.evaluation.membranes import Membranes, membrane_distribution
from tetdist.nn.integer_neurons import ILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.parallel_neurons import PSN

assert tetdist.__doc__  # registers the models


class Network(nn.Sequential):
    def forward(self, x, per_timestep=False):
        assert per_timestep, "no other call is allowed"
        return super().forward(x)


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_a_neuron_by_hand(reset):
    config = LIF(decay=0.5, threshold=2.0, reset=reset)
    # (T, B): u = 1, 0.5 + 2.1 = 2.6 (fires), then 0 (or 0.6) decayed + 9 (fires)
    found = membrane_distribution(
        Network(Neuron(config)), torch.tensor([[1.0], [2.1], [9.0]]), "fp32"
    )
    assert _bins(found) == pytest.approx({0.5: 1 / 3, 1.3: 1 / 3, 2.95: 1 / 3})
    assert found.fires == {"0": pytest.approx(2 / 3)}
    assert any(edge == pytest.approx(1) for edge in found.edges)


def test_a_current_that_all_timesteps_share():
    """By hand: u = 1, 1.5 and 1.75, of one current of 1."""

    class OfThree(Network):
        def forward(self, x, per_timestep=False):
            assert per_timestep
            return self[0](x, 3)

    found = membrane_distribution(
        OfThree(Neuron(LIF(decay=0.5, threshold=2.0))), torch.ones(1, 1), "fp32"
    )
    assert _bins(found) == pytest.approx({0.5: 1 / 3, 0.75: 1 / 3, 0.85: 1 / 3}, abs=0.05)


def test_membranes_of_other_kinds():
    """By hand: PLIF with half of each current, and a neuron that fires twice."""
    plif = PLIF(threshold=1.0)
    found = membrane_distribution(
        Network(Neuron(plif)), torch.tensor([[1.0], [2.0], [2.0]]), "fp32"
    )
    assert _bins(found) == pytest.approx({0.5: 1 / 3, 1.25: 1 / 3, 1.0: 1 / 3})
    assert found.fires == {"0": pytest.approx(2 / 3)}  # at the threshold, too
    ilif = ILIF(decay=0.5)
    found = membrane_distribution(Network(Neuron(ilif)), torch.tensor([[2.2], [0.4]]), "fp32")
    assert _bins(found) == pytest.approx({2.2: 1 / 2, 0.5: 1 / 2})
    assert found.fires == {"0": pytest.approx(2 / 8)}
    assert membrane_distribution(Network(Neuron(PSN(timesteps=2))), torch.ones(2, 1), "fp32") == (
        Membranes(found.edges, {}, {})
    )


def _bins(found):
    (fractions,) = found.fractions.values()
    return {round(found.edges[i], 2): one for i, one in enumerate(fractions) if one > 0}


@pytest.mark.parametrize("name", ["sew_resnet18", "spiking_resnet18"])
def test_what_fires_is_what_the_network_says(name):
    torch.manual_seed(0)
    model = (
        timm.create_model(name, num_classes=3, timesteps=3, width=8, stem_width=8)
        if (name == "spiking_resnet18")
        else timm.create_model(name, num_classes=3, timesteps=3, width=8)
    )
    model.set_execution("reference")
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(0.05)
    images = torch.randn(2, 3, 32, 32)
    rates = {}
    for layer, module in model.named_modules():
        if hasattr(module, "input_current"):
            module.register_forward_hook(
                lambda _module, _inputs, spikes, layer=layer: rates.update(
                    {layer: float(spikes.mean())}
                )
            )
    model.train()
    found = membrane_distribution(model, images, "fp32")
    assert model.training
    assert found.fires == pytest.approx(rates, abs=1e-6)
    assert max(rates.values()) > 0.01
    for layer, fractions in found.fractions.items():
        assert sum(fractions) == pytest.approx(1), layer
        above = [one for one, edge in zip(fractions, found.edges, strict=False) if edge > 0.999]
        assert sum(above) == pytest.approx(found.fires[layer], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_those_of_histc(dtype):
    lowest, highest, bins = membranes.LOWEST, membranes.HIGHEST, membranes.BINS
    borders = torch.linspace(lowest, highest, bins + 1, dtype=dtype)
    between = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    u = torch.cat([borders, between]).clamp(lowest, highest)
    expected = torch.histc(u, bins, lowest, highest)
    # Those of a network that has diverged are left out.
    u = torch.cat([u, u.new_tensor([torch.nan])])
    assert torch.equal(membranes._counts(u), expected.long())
