"""The synaptic operations in the loss, against convolutions of ones and plain autograd."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tetdist.apps.benchmarks import made_up
from tetdist.evaluation.operations import OperationCounts
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import AvgPool, Conv2d
from tetdist.training.operations import SynapticOperations


def share_and_gradients(model, x):
    operations = SynapticOperations(model)
    with operations.counted():
        model(x, per_timestep=True)
        share = operations.share()
        return share, gradients_of(share, model)


def gradients_of(share, model):
    return torch.autograd.grad(share, [*model.parameters()], materialize_grads=True)


def by_definition(model, x, spikes_of_one):
    """The same from convolutions with ones, of all inputs but the image, and real numbers."""
    sums, ones = [], torch.ones_like

    def count(layer, inputs):
        function, keys, (spikes,), weight = F.linear, {}, inputs, ones(layer.weight)
        if isinstance(layer, nn.Conv2d):
            keys = {"stride": layer.stride, "padding": layer.padding}
            function, spikes = F.conv2d, spikes.flatten(0, 1)
        dense = function(ones(spikes), weight, **keys).sum()
        sums.append(torch.stack([spikes_of_one * function(spikes, weight, **keys).sum(), dense]))

    for name, layer in model.named_modules():
        is_real = isinstance(layer, nn.Linear) and model.global_pool != "flatten"
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != "stem.conv" and not is_real:
            layer.register_forward_pre_hook(count)
    model(x, per_timestep=True)
    spikes, dense = torch.stack(sums).sum(0)
    return spikes / dense, gradients_of(spikes / dense, model)


def assert_same(result, expected):
    assert result[0] > 0.01
    assert any(gradient.abs().max() > 1e-4 for gradient in result[1])
    torch.testing.assert_close(result, expected)


# The network, an image's side, and the number of spikes that a value of 1 is. Several spikes of
# I-LIF count each, and those of NI-LIF, which sends quarters; sums of spikes count in a SEW-ResNet,
# and the mean of 3x3 positions before its classifier does not.
CASES = {
    "lif": ("spiking_convnet", {}, 28, 1),
    "ilif": ("spiking_convnet", {"neuron": {"kind": "ilif", "most_spikes": 3}}, 28, 1),
    "nilif": ("spiking_convnet", {"neuron": {"kind": "nilif", "most_spikes": 4}}, 28, 4),
    "sums": ("sew_resnet18", {"width": 4, "num_classes": 3}, 96, 1),
}


@pytest.mark.parametrize("segment", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_definition(case, segment):
    """With recomputed blocks, and by halves of the samples, too."""
    name, arguments, size, spikes_of_one = CASES[case]
    torch.manual_seed(0)
    model = timm.create_model(name, timesteps=2, **arguments).double()
    model.set_execution("reference")
    model.set_segment(segment)
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    result = share_and_gradients(model, x)
    model.set_grad_checkpointing(True)
    assert_same(share_and_gradients(model, x), result)
    model.set_grad_checkpointing(False)
    model.eval()  # Norms see each sample alone.
    whole, *halves = (share_and_gradients(model, part) for part in (x, x[:2], x[2:]))
    means = [sum(pair) / 2 for pair in zip(*(gradients for _, gradients in halves), strict=True)]
    assert_same(whole, ((halves[0][0] + halves[1][0]) / 2, tuple(means)))
    model.train().set_execution("fused")
    fused = share_and_gradients(model.float(), x.float())[0]
    assert fused.item() == pytest.approx(result[0].item(), rel=0.01)
    model.double().set_execution("reference")
    assert_same(result, by_definition(model, x, spikes_of_one))


@pytest.mark.parametrize("case", CASES)
def test_the_share_is_that_of_evaluations_counts(case, alone):
    """Of the accumulates of all layers but the first, in the pass that both see."""
    name, arguments, size, _ = CASES[case]
    torch.manual_seed(0)
    model, x = timm.create_model(name, timesteps=2, **arguments), torch.randn(3, 3, size, size)
    operations = SynapticOperations(model)
    with operations.counted(), OperationCounts(model) as counts:
        model(x)
        share = operations.share().item()
    _, *layers = counts.total(alone, len(x)).layers.values()
    layers = [layer for layer in layers if not layer.multiply_accumulates]
    assert len(layers) > 1
    dense = model.timesteps * sum(layer.synapses for layer in layers)
    assert share == pytest.approx(sum(layer.accumulates for layer in layers) / dense, rel=1e-6)


def test_a_mean_of_four_counts_its_spikes():
    """One spike of four in each mean reaches up to 9 places of each of 2 channels."""
    layers = nn.Sequential(Conv2d(1, 1, 1), Neuron(LIF()), AvgPool(), Conv2d(1, 2, 3, padding=1))
    nn.init.ones_(layers[0].weight)
    nn.init.zeros_(layers[0].bias)
    x = torch.zeros(1, 1, 1, 8, 8)
    x[..., 2, 2] = x[..., 0, 1] = x[..., 7, 3] = 2.0  # A middle, a corner and a border.
    operations = SynapticOperations(layers)
    with operations.counted():
        layers(x)
        assert operations.share() == 2 * (9 + 4 + 6) / (2 * (4 * 4 * 9 - 4 * 3 * 4 + 4))
    assert not any(module._forward_hooks for module in layers.modules())


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_a_step_adds_the_share_of_each_micro_batch_to_its_loss(recompute, alone):
    case = {"size": 28, "batch": 2, "accumulation": 2, "timesteps": 2, "recompute": recompute}
    case |= {"engine": "torch", "precision": "fp64"}
    steps = [
        made_up.training_step(alone, "spiking_convnet", loss=loss, **case)
        for loss in ({}, {"operations": 0.0}, {"operations": 0.5})
    ]
    images = [steps[0].batch_of(0, number)[0] for number in range(2)]
    model = copy.deepcopy(steps[0].step.model)
    shares = [share_and_gradients(model, x)[0].item() for x in images]
    without, zero, added = (step.take()[0].item() / 2 for step in steps)
    assert added - without == pytest.approx(0.5 * sum(shares), rel=1e-9)
    weights = [step.step.model.state_dict().values() for step in steps]
    assert without == zero
    assert all(map(torch.equal, *weights[:2]))
    assert not all(map(torch.equal, *weights[1:]))
