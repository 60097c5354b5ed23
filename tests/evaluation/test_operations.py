"""Operations against counts done by hand."""

import pytest
import timm
import torch
from torch import Tensor, nn

import tetdist
from tetdist.distributed.world import World
from tetdist.evaluation.operations import OperationCounts, Operations

assert tetdist.__doc__  # registers the models


def count(model: nn.Module, world: World, *batches: Tensor) -> Operations:
    with OperationCounts(model) as counts, torch.no_grad():
        for batch in batches:
            model(batch)
    return counts.total(world, sum(len(batch) for batch in batches))


class Layer(nn.Module):
    """One layer of (T, B, ...) inputs, given as (B, T, ...)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        from tetdist.nn.packed import Conv2d

        x = x.transpose(0, 1)
        if isinstance(self.layer, nn.Linear | Conv2d):
            return self.layer(x)
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv(stride: int = 1, groups: int = 1) -> Layer:
    from tetdist.nn.packed import Conv2d

    return Layer(Conv2d(2, 4, 3, stride=stride, padding=1, groups=groups, bias=False))


def spikes_at(*places: tuple[int, int, int, int], size: int = 4, value: float = 1.0) -> Tensor:
    """One sample of 2 timesteps and 2 channels that spikes at (t, channel, row, column)."""
    x = torch.zeros(1, 2, 2, size, size)
    for place in places:
        x[(0, *place)] = value
    return x


def test_a_spike_is_counted_at_each_output_that_it_reaches(alone):
    """Those that have a gradient there, at every place: of borders, strides and groups."""
    for layer, size in ((conv(), 4), (conv(stride=2), 4), (conv(stride=2), 3), (conv(2, 2), 6)):
        nn.init.ones_(layer.layer.weight)
        x = torch.ones(1, 2, 2, size, size, requires_grad=True)
        layer(x).sum().backward()
        found = count(layer, alone, x.detach())
        assert found.accumulates == x.grad.sum()
        assert found.relu_multiply_accumulates == x.grad.sum() / 2  # of one timestep
        for place in ((0, 0, 1, 1), (1, 1, 0, 2), (0, 1, 2, 2), (1, 0, 2, 0)):
            one = count(layer, alone, spikes_at(place, size=size))
            assert one.accumulates == x.grad[(0, *place)], place
    # In the middle 9 positions of 4 channels, at a border 6.
    both = spikes_at((0, 0, 1, 1), (1, 1, 0, 2))
    assert count(conv(), alone, both).accumulates == (9 + 6) * 4


def test_sums_means_and_real_numbers(alone):
    place = (0, 0, 1, 1)
    sums = count(conv(), alone, spikes_at(place, value=3.0))
    assert (sums.accumulates, sums.multiply_accumulates) == (3 * 36, 0)
    means = count(conv(), alone, spikes_at(place, value=0.75))
    assert (means.accumulates, means.multiply_accumulates) == (3 * 36, 0)
    synapses = 4 * 2 * (4 * 4 * 9 - 4 * 3 * 4 + 4)  # without those of the padding
    for value in (0.3, -1.0):
        real = count(conv(), alone, spikes_at(place, value=value))
        assert (real.accumulates, real.multiply_accumulates) == (0, 2 * synapses)
    # One real number among whole ones decides, in whichever batch it is.
    mixed = count(conv(), alone, spikes_at(place), spikes_at(place, value=0.3))
    assert (mixed.accumulates, mixed.multiply_accumulates) == (0, 2 * synapses)


def test_a_network(alone):
    """A SEW-ResNet: its first layer once for all timesteps, its sums as events, its head real."""
    torch.manual_seed(0)
    model = timm.create_model("sew_resnet18", num_classes=3, timesteps=2, width=4).eval()
    model.set_execution("reference")
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(0.02)  # so that it fires
    seen: dict[str, Tensor] = {}
    names = ("blocks.1.conv1.conv", "fc")
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.update({name: inputs[0]})
        )
    found = count(model, alone, torch.randn(2, 3, 32, 32))
    stem = found.layers["stem.conv"]
    assert stem.accumulates == 0
    assert stem.multiply_accumulates == stem.synapses > 0  # not twice
    sums = seen["blocks.1.conv1.conv"]
    assert sums.max() >= 2
    ones = torch.nn.functional.conv2d(sums.flatten(0, 1), torch.ones(4, 4, 3, 3), padding=1)
    assert found.layers["blocks.1.conv1.conv"].accumulates == ones.sum() / 2
    # 1x1 positions: their mean is the spikes themselves.
    assert found.layers["fc"].accumulates == pytest.approx(float(seen["fc"].sum()) * 3 / 2)
    assert not found.layers["fc"].multiply_accumulates
    # Each of two timesteps updates every membrane: those of the stem, and of four layers a stage,
    # plus a projection's in all stages but the first. An ADD has none.
    assert stem.membrane_updates == 2 * 4 * 16 * 16
    assert found.layers["fc"].membrane_updates == 0
    stages = 4 * (4 * 8 * 8) + 5 * (8 * 4 * 4) + 5 * (16 * 2 * 2) + 5 * 32
    updates = [layer.membrane_updates for layer in found.layers.values()]
    assert sum(updates) == 2 * (4 * 16 * 16 + stages)
    assert (stem.weights, found.layers["fc"].weights) == (7 * 7 * 3 * 4, 3 * 32)
    assert found.most_spikes == 1


# --------------------------------------------------------------------------------------- attention


class Products(nn.Module):
    """A sum of products of what is given as (B, 3, T, C, H, W), three inputs of it."""

    def __init__(self, product: nn.Module, inputs: int) -> None:
        super().__init__()
        self.product, self.inputs = product, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.product(*(x[:, i].transpose(0, 1) for i in range(self.inputs)))


def test_attentions_products_are_counted(alone):
    from tetdist.nn.products import HeadSum, LinearAttention, PositionSum

    # One sample at one timestep: two heads of three channels, 2x2 positions.
    x = torch.zeros(1, 3, 1, 6, 2, 2)
    q, k, v = x[0, :, 0]
    k[0, 0, 0] = k[1, 0, 0] = v[0, 0, 0] = v[2, 0, 0] = v[1, 1, 1] = 1  # the first head
    k[3, 0, 1] = v[4, 0, 1] = v[5, 0, 1] = 1  # the second head
    q[0, 0, 0] = q[5, 1, 1] = 1

    found = count(Products(LinearAttention(heads=2), 3), alone, x)
    # At the first position two spikes of k with two of v, at the second one with two; at the last
    # one of v alone. A spike of q adds three sums.
    assert found.accumulates == 2 * 2 + 1 * 2 + 2 * 3
    assert found.relu_multiply_accumulates == 2 * (2 * 4 * 3 * 3)
    assert [layer.weights for layer in found.layers.values()] == [0]
    assert not found.multiply_accumulates
    # Of values with twice the channels, a spike of k meets six in its head, and one of q adds six.
    wider = torch.ones(1, 1, 12, 2, 2)
    assert LinearAttention(heads=2).accumulates(x[:, 0], x[:, 1], wider) == 3 * 6 + 2 * 6
    assert LinearAttention(heads=2).synapses(x[:, 0], x[:, 1], wider) == 2 * (2 * 4 * 3 * 6)

    x[0, 0], x[0, 1] = x[0, 1].clone(), x[0, 2].clone()  # k and v
    found = count(Products(PositionSum(), 2), alone, x)
    assert found.accumulates == 1  # the first channel's at the first position
    assert found.relu_multiply_accumulates == 6 * 4
    found = count(Products(HeadSum(heads=2), 1), alone, x)
    assert found.accumulates == 3  # spikes of k
    assert found.relu_multiply_accumulates == 6 * 4

    real = count(Products(HeadSum(heads=2), 1), alone, x, 0.5 * x)
    assert (real.accumulates, real.multiply_accumulates) == (0, 6 * 4)


@pytest.mark.parametrize(
    ("name", "arguments", "layer"),
    [
        (
            "qkformer_10_384",
            {"widths": (8, 8, 8), "depths": (1, 1, 1), "heads": 2},
            "blocks.4.attention.attention",
        ),
        ("sdt_8_384", {"channels": 16, "depth": 1}, "blocks.0.attention.sum"),
        (
            "maxformer_10_384",
            {"widths": (8, 8, 8), "depths": (1, 1, 1), "heads": 2},
            "blocks.4.mixer.attention",
        ),
    ],
)
def test_a_transformer(name, arguments, layer, alone):
    """Attention is a layer among the others; only the first one, and a mean's, see real numbers."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, timesteps=2, **arguments).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_var.fill_(0.02)
            module.bias.data.fill_(1.0)
    found = count(model, alone, torch.randn(2, 3, 64, 64))
    assert found.layers[layer].accumulates > 0
    real = {name for name, one in found.layers.items() if one.multiply_accumulates}
    assert real == {model.default_cfg["first_conv"]} | ({"fc"} if name[0] == "q" else set())
    assert all(one.synapses > 0 for one in found.layers.values())
