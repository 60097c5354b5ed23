"""PreAct- and MS-ResNets: networks whose shortcuts carry currents, against their definitions."""

import copy
import inspect
from typing import Any

import pytest
import timm
import torch
from published_networks import (
    DECOUPLING,
    MS,
    SEAL,
    Definition,
    Shapes,
    ms_shapes,
    preact_shapes,
    random_state,
)
from torch import Tensor, nn

from tetdist.apps.weights import foreign
from tetdist.models import SpikingNetwork
from tetdist.models.preact_resnet import Block
from tetdist.nn.batch_norm import BatchNorm, defer_running_statistics, update_running_statistics
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron, spiking_layers

T = 3


pytestmark = pytest.mark.usefixtures("one_thread")


PREACT = {"preact_resnet18": (2, 2, 2, 2), "preact_resnet34": (3, 4, 6, 3)}
MS_LAYERS = {
    "ms_resnet18": (2, 2, 2, 2),
    "ms_resnet34": (3, 4, 6, 3),
    "ms_resnet104": (3, 8, 32, 8),
}
PUBLISHED: dict[str, Shapes] = {name: preact_shapes(layers) for name, layers in PREACT.items()} | {
    name: ms_shapes(layers, deep=name.endswith("104")) for name, layers in MS_LAYERS.items()
}


# ------------------------------------------------------------------------------ as published


@pytest.mark.parametrize(
    ("name", "parameters", "layers_of_neurons", "entries"),
    [
        ("preact_resnet18", 11_694_312, 16, 142),
        ("preact_resnet34", 21_806_184, 32, 254),
        ("ms_resnet18", 11_693_736, 17, 128),
        ("ms_resnet34", 21_801_896, 33, 224),
        ("ms_resnet104", 77_350_504, 103, 649),
    ],
)
def test_as_large_as_published(
    name: str, parameters: int, layers_of_neurons: int, entries: int
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(spiking_layers(model)) == layers_of_neurons
    # What weights-in is tested with has the size of the published files.
    assert len(PUBLISHED[name]) == entries
    learned = [key for key in PUBLISHED[name] if "running" not in key and "num" not in key]
    assert sum(torch.Size(PUBLISHED[name][key]).numel() for key in learned) == parameters
    names = foreign._names(model)
    shapes = {names[key]: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {k: v for k, v in PUBLISHED[name].items() if "num_batches" not in k}


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("spiking_resnet18_cifar", {}, 11_173_962),
        ("spiking_resnet18_cifar", {"num_classes": 100}, 11_220_132),
        ("spiking_resnet19", {"stem_width": 128}, 12_697_994),
        ("spiking_resnet19", {"stem_width": 128, "num_classes": 100}, 12_721_124),
        ("spiking_resnet19_dvs", {}, 12_696_842),
    ],
)
def test_networks_for_cifar_and_events_are_as_large_as_published(
    name: str, arguments: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_how_ms_resnets_begin() -> None:
    torch.manual_seed(0)
    model = timm.create_model("ms_resnet18", width=8, neuron=LIF(threshold=0.5))
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            # A residual branch begins with nothing.
            expected = 0.0 if name.startswith("blocks") and name.endswith("add.norm") else 0.5
            assert module.weight.eq(expected).all(), name
            assert module.scale == 1.0
    conv = model.blocks[1].conv2
    bound = (9 * conv.in_channels) ** -0.5  # torch's own initial values
    assert 0.9 * bound < conv.weight.abs().max() <= bound


# ----------------------------------------------------------------------------- the definitions

# Networks of all kinds of stem, projection and head, neurons of both resets.
SMALL: dict[str, tuple[str, dict[str, Any], Shapes, str, Any]] = {
    "preact, decoupling": (
        "preact_resnet18",
        {"width": 8},
        preact_shapes((2, 2, 2, 2), 8, 5),
        "decoupling",
        DECOUPLING,
    ),
    "preact, seal": (
        "preact_resnet34",
        {"width": 4},
        preact_shapes((3, 4, 6, 3), 4, 5),
        "seal",
        SEAL,
    ),
    "ms": ("ms_resnet34", {"width": 8}, ms_shapes((3, 4, 6, 3), 8, 5), "ms", MS),
    "ms, deep": (
        "ms_resnet18",
        {"width": 8, "stem": "deep", "pooled_projections": True},
        ms_shapes((2, 2, 2, 2), 8, 5, deep=True),
        "ms",
        MS,
    ),
}


def created(case: str) -> tuple[SpikingNetwork, dict[str, Tensor]]:
    """Our network with weights taken over from a published state, and that state."""
    name, arguments, shapes, source, _ = SMALL[case]
    neuron = foreign.neuron_of(source, name)
    model = timm.create_model(name, num_classes=5, timesteps=T, neuron=neuron, **arguments).double()
    state = random_state(shapes)
    result = foreign.convert(state, source, model)
    assert (result.missing, result.unexpected) == ([], [])
    model.load_state_dict(result.weights)
    return model, state


def images(size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("execution", ["reference", "fused"])
@pytest.mark.parametrize("case", SMALL)
def test_network_is_its_definition(case: str, execution: str, training: bool) -> None:
    model, state = created(case)
    model.set_execution(execution)
    model.train(training)
    x = images(64).requires_grad_()
    logits = model(x, per_timestep=True)
    for key in state:
        if "running" not in key and "num" not in key:
            state[key].requires_grad_()
    definition = Definition(state, SMALL[case][4], T, training)
    own_x = x.detach().clone().requires_grad_()
    if case.startswith("preact"):
        expected = definition.preact(own_x)
        assert expected.detach().std(0).max() > 0.01  # time makes a difference
    else:
        # There the mean over time comes before the classifier.
        logits, expected = logits.mean(0), definition.ms(own_x)
    assert expected.detach().std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, own_x.grad, rtol=1e-8, atol=1e-10)
    names = foreign._names(model)
    for key, parameter in model.named_parameters():
        grad = state[names[key]].grad
        assert grad is not None
        scale = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-10 * scale, msg=key)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().max() > 1e-3
    for key, value in model.named_buffers():
        if key in names:
            torch.testing.assert_close(value, state[names[key]], rtol=1e-9, atol=1e-12, msg=key)


def test_logits_of_each_timestep_are_those_of_its_features() -> None:
    """MS-ResNet's mean over time comes before its linear classifier, ours after it: the same."""
    model, _ = created("ms")
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images()), pre_logits=True)
        assert len(features.unique(dim=0)) == T
        torch.testing.assert_close(model(images()), model.fc(features.mean(0)))


def test_biases_before_a_norm_learn_nothing() -> None:
    """As the docstring says; they only move the running mean."""
    model, _ = created("preact, decoupling")
    model(images(), per_timestep=True).square().sum().backward()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias.grad.abs().max() < 1e-12 * module.weight.grad.abs().max(), name


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"drop_rate": 1.0}, "a drop rate must be at least 0 and below 1, not 1.0"),
        ({"stem": "imagenet"}, "stem must be 'plain', 'deep' or 'cifar', not 'imagenet'"),
    ],
)
def test_bad_argument_is_named(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        timm.create_model("ms_resnet18", **arguments)


def test_a_pooled_projection_has_the_stride_2() -> None:
    with pytest.raises(ValueError, match="has the stride 2, not 1"):
        Block(4, 8, 1, LIF(), pooled_projection=True)


# ----------------------------------------------------------------------- the real-valued stream


@pytest.mark.parametrize("case", ["preact, decoupling", "ms, deep"])
def test_stem_is_convolved_once_as_if_the_image_were_repeated(case: str) -> None:
    model, _ = created(case)
    repeated = copy.deepcopy(model)
    convolved = model.stem.conv if case.startswith("preact") else model.stem.conv[-1]
    seen: list[int] = []
    convolved.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    x = images()
    stream = model.forward_stem(model.time_first(x), T)
    assert seen == [1]
    expected = repeated.forward_stem(x.expand(T, *x.shape), T)
    assert stream.shape == (1, *expected.shape[1:])
    torch.testing.assert_close(stream.expand_as(expected), expected)
    for name in ("running_mean", "running_var"):
        own, other = (getattr(m.stem.add.norm, name) for m in (model, repeated))
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(stream, stream.round())


def test_what_sees_real_numbers_and_what_spikes() -> None:
    """Every convolution sees spikes, but those of the stem and of projections."""
    model, _ = created("preact, decoupling")
    found: dict[str, bool] = {}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor], _output: Tensor) -> None:
            x = arguments[0]
            found[name] = torch.equal(x, x.round().clamp(0, 1))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(look(name))
    model.eval()(images())
    real = {name for name, spikes in found.items() if not spikes}
    assert real == {"stem.conv", "fc", *(f"blocks.{i}.downsample" for i in (2, 4, 6))}
    assert len(found) == 21


def test_blocks_keep_real_numbers_where_they_are_computed_again() -> None:
    """Half a byte would not hold them."""
    model, _ = created("ms")
    assert model.spike_levels is None
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    for one in (model, again):
        one(images(), per_timestep=True).square().sum().backward()
    for (key, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), key


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("case", ["preact, decoupling", "ms", "ms, deep"])
def test_an_image_is_as_its_copies_at_all_timesteps(case: str, segment: int | None) -> None:
    """Logits, gradients and running statistics, computed again or not."""
    model, _ = created(case)
    repeated, again = copy.deepcopy(model), copy.deepcopy(model)
    repeated.time_first = lambda x: x.expand(T, *x.shape)
    again.set_grad_checkpointing()
    logits = []
    for one in (model, repeated, again):
        one.set_segment(segment)
        defer_running_statistics(one)
        logits.append(one(images(), per_timestep=True))
        logits[-1].square().sum().backward()
        update_running_statistics(one, lambda averages: averages)
    assert torch.equal(logits[0], logits[2])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-11)
    for key, parameter in model.named_parameters():
        others = [dict(one.named_parameters())[key].grad for one in (repeated, again)]
        scale = max(1.0, parameter.grad.abs().max().item())
        for other in others:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-8, atol=1e-10 * scale)
    norms = [key for key in model.state_dict() if "running_mean" in key]
    for key in norms:
        torch.testing.assert_close(
            *(one.state_dict()[key] for one in (model, repeated)), rtol=1e-9, atol=1e-12
        )


def test_neurons_are_a_networks_own() -> None:
    """Each layer of neurons is one by itself, or that of a convolution."""
    model, _ = created("ms")
    alone = [name for name, module in model.named_modules() if isinstance(module, Neuron)]
    assert alone == [*(f"blocks.{i}.neuron" for i in range(16)), "neuron"]
    assert "neuron" in inspect.signature(type(model)).parameters
