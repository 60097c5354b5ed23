"""The synaptic operations in the loss, against convolutions of ones and plain autograd."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tetdist.apps.benchmarks import made_up
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import AvgPool, Conv2d
from tetdist.training.operations import SynapticOperations

SEW = {"width": 4, "num_classes": 3}


def made(name, neuron=None, dtype=torch.float64, execution="reference", **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, timesteps=2, neuron=neuron, **arguments).to(dtype)
    model.set_execution(execution)
    return model.train()


def images(count, size, dtype=torch.float64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def share_and_gradients(model, x):
    operations = SynapticOperations(model)
    with operations.counted():
        model(x, per_timestep=True)
    share = operations.share()
    return share, gradients_of(share, model)


def gradients_of(share, model):
    return torch.autograd.grad(share, [*model.parameters()], materialize_grads=True)


def by_definition(model, x, spikes_of_one):
    """The same from convolutions with ones, of the inputs that ``spikes_of_one`` names."""
    sums, ones = [], torch.ones_like
    for name, factor in spikes_of_one.items():

        def count(layer, inputs, factor=factor):
            function, keys = F.linear, {}
            (spikes,), weight = inputs, ones(layer.weight)
            if isinstance(layer, nn.Conv2d):
                keys = {"stride": layer.stride, "padding": layer.padding}
                function, spikes = F.conv2d, spikes.flatten(0, 1)
            dense = function(ones(spikes), weight, **keys).sum()
            sums.append(torch.stack([factor * function(spikes, weight, **keys).sum(), dense]))

        model.get_submodule(name).register_forward_pre_hook(count)
    model(x, per_timestep=True)
    spikes, dense = torch.stack(sums).sum(0)
    return spikes / dense, gradients_of(spikes / dense, model)


def assert_same(result, expected, **tolerance):
    assert result[0] > 0.01
    assert any(gradient.abs().max() > 1e-4 for gradient in result[1])
    torch.testing.assert_close(result, expected, **tolerance)


CONVNET = ("blocks.0.conv", "blocks.1.conv", "fc")
CASES = {
    "spiking_convnet": (28, {"kind": "lif"}, dict.fromkeys(CONVNET, 1)),
    # Several spikes count each, and those of NI-LIF, which sends quarters, too.
    "ilif": (28, {"kind": "ilif", "most_spikes": 3}, dict.fromkeys(CONVNET, 1)),
    "nilif": (28, {"kind": "nilif", "most_spikes": 4}, dict.fromkeys(CONVNET, 4)),
    # Sums of spikes count, the mean of 3x3 positions before the classifier does not.
    "sew_resnet18": (96, None, None),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_definition(case):
    size, neuron, factors = CASES[case]
    name, arguments = ("sew_resnet18", SEW) if factors is None else ("spiking_convnet", {})
    model, x = made(name, neuron, **arguments), images(2, size)
    convs = [n for n, m in model.named_modules() if isinstance(m, Conv2d) and n != "stem.conv"]
    result = share_and_gradients(model, x)
    assert_same(result, by_definition(model, x, factors or dict.fromkeys(convs, 1)))
    fused = share_and_gradients(made(name, neuron, torch.float32, "fused", **arguments), x.float())
    assert fused[0].item() == pytest.approx(result[0].item(), rel=0.01)


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


def test_micro_batches_have_the_mean_of_their_samples():
    model, x = made("spiking_convnet").eval(), images(4, 28)
    halves = [share_and_gradients(model, half) for half in x.split(2)]
    means = [torch.stack(pair).mean(0) for pair in zip(*(half[1] for half in halves), strict=True)]
    share = (halves[0][0] + halves[1][0]) / 2
    assert halves[0][0] != halves[1][0]
    assert_same(share_and_gradients(model, x), (share, tuple(means)))


def test_a_step_adds_the_share_to_its_loss(alone):
    case = {"size": 28, "batch": 2, "accumulation": 1, "timesteps": 2}

    def step(weight):
        settings = {"engine": "torch", "precision": "fp64", "loss": {"operations": weight}}
        return made_up.training_step(alone, "spiking_convnet", **case, **settings)

    losses = {weight: float(step(weight).take()[0] / 2) for weight in (0.0, 0.5, 1.0)}
    model = step(0.0).step.model
    share, _ = share_and_gradients(model, step(0.0).batch_of(0, 0)[0])
    assert losses[1.0] - losses[0.0] == pytest.approx(share.item(), rel=1e-9)
    assert losses[0.5] - losses[0.0] == pytest.approx(share.item() / 2, rel=1e-9)
