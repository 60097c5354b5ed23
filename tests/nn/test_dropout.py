"""Dropout and stochastic depth: a sample's masks do not depend on its batch, and timm's
arithmetic."""

import itertools

import numpy as np
import pytest
import timm
import torch
from kernel_runs import SMALL, step
from timm.layers import DropPath as TimmDropPath
from torch import nn

from tetdist import order
from tetdist.nn import batch_norm, dropout
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.dropout import Dropout, DropPath
from tetdist.nn.norm_neuron import NormAdd, NormNeuron

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each family and kind of block.
MODELS = (
    *("sew_resnet18", "sew_resnet50", "spiking_resnet18", "preact_resnet18", "ms_resnet18"),
    *("qkformer_4_384_cifar", "sdt_2_256_cifar", "espikeformer_t", "ms_qkformer_4_384_cifar"),
)
RATES = {"drop_path_rate": 0.5, "drop_rate": 0.25}
T, BATCH = 2, 6


def network(name, **arguments):
    torch.manual_seed(0)
    if name == "sdt_2_256_cifar":  # a single block is never dropped
        arguments["depth"] = 2
    model = timm.create_model(name, timesteps=T, num_classes=3, **SMALL[name] | arguments)
    for module in model.modules():
        # MS-ResNet's branches start with weight 0.
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    batch_norm.defer_running_statistics(model)
    return model.train()


def set_masks(model, value=None):
    """Set a model's masks from random numbers, or all from one value."""
    layers = dropout.dropping(model)
    generator = torch.Generator().manual_seed(1)
    count = dropout.num_factors(layers)
    uniforms = torch.rand(BATCH, count, dtype=torch.float64, generator=generator)
    dropout.set_factors(
        layers, dropout.factors(layers, uniforms if value is None else uniforms * 0 + value)
    )
    return layers


def images():
    return 3 * torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("execution", ["reference", "fused"])
def test_a_branch_is_dropped_as_by_timm(execution):
    """The same mask gives the same sum and gradients, with or without a norm of the shortcut."""
    generator = torch.Generator().manual_seed(0)
    x, shortcut, grad = torch.randn(3, T, BATCH, 4, 3, 3, generator=generator).double()
    theirs, ours = TimmDropPath(0.4), NormAdd(4, drop_path=0.4).double()
    ours.execution = execution
    other = BatchNorm(4).double()
    for norm in (None, other):
        torch.manual_seed(3)
        mask = theirs(torch.ones(BATCH, 1, dtype=torch.float64))
        assert len(mask.unique()) == 2
        dropout.set_factors(dropout.dropping(ours), mask)
        results = []
        for is_ours in (True, False):
            leaves = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]
            if is_ours:
                y = ours(leaves[0], leaves[1], norm)
            else:
                torch.manual_seed(3)
                dropped = theirs(ours.norm(leaves[0]).transpose(0, 1)).transpose(0, 1)
                y = dropped + (leaves[1] if norm is None else norm(leaves[1]))
            results.append([y, *torch.autograd.grad(y, [*leaves, ours.norm.weight], grad)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_neurons_of_a_dropped_branch_see_the_shortcut_alone():
    layer = NormNeuron(4, timm.create_model("spiking_resnet18").stem.neuron.neuron, drop_path=0.5)
    layer.double()
    generator = torch.Generator().manual_seed(0)
    current, shortcut = torch.randn(2, T, BATCH, 4, 3, 3, generator=generator).double()
    for value, total in ((0.0, shortcut), (0.9, shortcut + 2 * layer.norm(current))):
        set_masks(layer, value)
        spikes = layer(current, T, shortcut=shortcut)
        assert 0 < spikes.mean() < 1
        assert torch.equal(spikes, layer.neuron.run(total, None)[0])


def test_features_are_dropped_at_all_timesteps_or_none():
    layer, x = Dropout(0.25, 64), torch.rand(T, 50, 64, dtype=torch.float64) + 1
    torch.manual_seed(0)
    y = layer(x)
    kept = y != 0
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert not torch.equal(layer(x), y)
    assert layer.eval()(x) is x
    assert Dropout(0.0, 64)(x) is x


@pytest.mark.parametrize("name", ["sew_resnet18", "qkformer_4_384_cifar"])
def test_spikes_of_a_dropped_branch_leave_whole_numbers(name):
    """Kept spikes are not scaled, so that sums fit into the bytes that blocks exchange."""
    model = network(name, **RATES)
    set_masks(model)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images())
    for x, highest in zip(seen, model.highest_inputs, strict=True):
        assert torch.equal(x, x.round())
        assert 0 <= x.min() <= x.max() <= highest


def test_a_block_that_is_dropped_passes_its_input():
    for name in ("sew_resnet18", "sew_resnet50", "preact_resnet18", "sdt_2_256_cifar"):
        model = network(name, **RATES)
        set_masks(model, 0.0)
        inputs = []
        model.blocks[-1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # noqa: B023  # called before the next round
        outputs = model.forward_features(images())
        assert inputs[0].any()
        assert torch.equal(outputs, inputs[0]), name


# --------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("name", MODELS)
def test_a_network_drops_the_same_when_computed_otherwise(name):
    """Fused equals the definition; recomputed blocks are bitwise equal despite draws in between."""
    x = images()
    results = []
    for execution in ("reference", "fused"):
        model = network(name, **RATES).double()
        model.set_execution(execution)
        assert [layer.rate for layer in set_masks(model)][-2:] == [0.5, 0.25]
        results.append(step(model, x.double()))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-8, atol=1e-10, msg=key)

    results = []
    for recomputed in (False, True):
        model = network(name, **RATES)
        model.set_grad_checkpointing(recomputed)
        set_masks(model)
        results.append(step(model, x, "bf16"))
    assert [key for key in results[0] if not torch.equal(results[0][key], results[1][key])] == []


@pytest.mark.parametrize("name", ["sew_resnet18", "preact_resnet18"])
def test_segments_drop_the_same(name):
    """So do a network's own draws, which differ in a second forward pass."""
    x = images().double()
    results = []
    for recomputed in (False, True):
        model = network(name, **RATES).double()
        model.set_segment(1)
        model.set_grad_checkpointing(recomputed)
        torch.manual_seed(5)
        losses = [model(x).square().mean() for _ in range(2)]
        assert losses[0] != losses[1]
        for loss in losses:
            loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["sew_resnet18", "preact_resnet18", "espikeformer_t"])
def test_nothing_is_dropped_in_evaluation_or_at_rate_0(name):
    x, plain, dropping = images(), network(name), network(name, **RATES)
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    assert dropout.dropping(plain) == []
    set_masks(dropping, 0.0)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert not torch.equal(plain(x), dropping(x))
        assert torch.equal(plain.eval()(x), dropping.eval()(x))
    assert torch.equal(before, torch.get_rng_state())


def test_rates_rise_as_timms():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=5, drop_path_rate=0.3)
    expected = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks]
    assert dropout.rising_rates(0.3, 5) == pytest.approx(expected)
    model = network("qkformer_4_384_cifar", drop_path_rate=0.3)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath) and m.rate]
    assert rates == pytest.approx([0.15, 0.15, 0.3, 0.3])  # of two branches a block


# ----------------------------------------------------------------------------------- the numbers


def test_what_is_dropped_belongs_to_the_sample():
    """Masks do not depend on the division of samples, but on seed, step and layer."""
    parts = [order.drop_uniforms(3, 7, number, 2, 5) for number in range(4)]
    assert np.array_equal(np.concatenate(parts), order.drop_uniforms(3, 7, 0, 8, 5))
    assert np.array_equal(parts[1], order.drop_uniforms(3, 7, 0, 8, 6)[2:4, :5])
    many = [order.drop_uniforms(s, t, 0, 8, 5) for s, t in itertools.product(range(3), range(3))]
    assert len(np.unique(many)) == 9 * 8 * 5
    layers = [Dropout(0.1, 1), Dropout(0.6, 3)]
    factors = dropout.factors(layers, torch.from_numpy(order.drop_uniforms(0, 0, 0, 4000, 4)))
    assert factors[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert factors[:, 1:].unique().tolist() == pytest.approx([0, 2.5])
    shares = (factors > 0).double().mean(0).tolist()
    assert shares == pytest.approx([0.9, 0.4, 0.4, 0.4], abs=0.03)
