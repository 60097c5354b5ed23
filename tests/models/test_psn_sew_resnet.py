"""SEW-ResNets of parallel spiking neurons: their definition, and weights to begin with."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from published_networks import Definition, Shapes, psn_sew_shapes, random_state
from torch import Tensor

from tetdist.apps.cli.convert import main as convert
from tetdist.apps.weights import foreign
from tetdist.apps.weights.nir_graph import to_nir
from tetdist.errors import UserError
from tetdist.models import SpikingNetwork
from tetdist.nn.norm_neuron import spiking_layers
from tetdist.nn.parallel_neurons import PSN
from tetdist.nn.precision import autocast

pytestmark = pytest.mark.usefixtures("one_thread")

T = 3
LAYERS = {"psn_sew_resnet18": (2, 2, 2, 2), "psn_sew_resnet34": (3, 4, 6, 3)}


def small(name: str = "psn_sew_resnet18", **arguments: Any) -> SpikingNetwork:
    torch.manual_seed(0)
    arguments = {
        "width": 4,
        "num_classes": 5,
        "timesteps": T,
        "neuron": {"timesteps": T},
    } | arguments
    return timm.create_model(name, **arguments)


def loaded(name: str) -> tuple[SpikingNetwork, dict[str, Tensor]]:
    """A small network with a published state, and that."""
    state = random_state(psn_sew_shapes(LAYERS[name], 4, 5, T))
    model = small(name).double()
    assert foreign.source_of(state, Path("x")) == "psn"
    found = foreign.convert(state, "psn", model)
    assert (found.missing, found.unexpected, found.initialised) == ([], [], [])
    model.load_state_dict(found.weights)
    return model, state


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "parameters", "layers_of_neurons"),
    [("psn_sew_resnet18", 11_689_916, 20), ("psn_sew_resnet34", 21_798_396, 36)],
)
def test_as_published(name: str, parameters: int, layers_of_neurons: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = spiking_layers(model)
    assert len(layers) == layers_of_neurons
    assert {layer.neuron for layer in layers.values()} == {PSN(timesteps=4)}
    shapes: Shapes = psn_sew_shapes(LAYERS[name])
    names = foreign._names(model)
    assert {names[key] for key in model.state_dict()} == {
        key.replace(".fc.", ".") for key in shapes if "num_batches" not in key
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "execution"), [("psn_sew_resnet18", "reference"), ("psn_sew_resnet34", "fused")]
)
def test_network_is_its_definition(name: str, execution: str, training: bool) -> None:
    model, state = loaded(name)
    model.to(memory_format=torch.channels_last).set_execution(execution)
    model.train(training)
    x = images().requires_grad_()
    logits = model(x, per_timestep=True)
    for key in state:
        if "running" not in key and "num" not in key:
            state[key].requires_grad_()
    own_x = x.detach().clone().requires_grad_()
    expected = Definition(state, None, T, training).psn_sew(own_x)
    assert expected.detach().std(0).max() > 0.01  # time makes a difference
    assert expected.detach().std(1).max() > 0.01  # and so do images
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).double()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, own_x.grad, rtol=1e-8, atol=1e-10)
    theirs = {key.replace(".fc.", "."): value for key, value in state.items()}
    names = foreign._names(model)
    for key, parameter in model.named_parameters():
        grad = theirs[names[key]].grad
        assert grad is not None, key
        scale = max(1.0, grad.abs().max().item())
        own = parameter.grad.view(grad.shape)
        torch.testing.assert_close(own, grad, rtol=1e-8, atol=1e-10 * scale, msg=key)
    assert model.offsets.grad.abs().max() > 1e-3
    for key, value in model.named_buffers():
        if key not in names:
            continue
        torch.testing.assert_close(value, theirs[names[key]], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("connect", ["add", "and"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_means_are_not_kept_in_bytes(dtype: torch.dtype, connect: str) -> None:
    """Ninths go into no byte: gradients are those of a recomputed network to the bit, and near
    those of the definition."""
    model = small(width=8, connect_function=connect).train()
    x = images(torch.float32)
    if dtype == torch.float64:
        model, x = model.double(), x.double()
    with torch.no_grad():
        for layer in spiking_layers(model).values():
            layer.learned["bias"].fill_(1)  # so that products of spikes are not all 0
    gradients = []
    for execution, recompute in (("fused", False), ("fused", True), ("reference", False)):
        model.set_execution(execution)
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with autocast(x.device, "fp64" if dtype == torch.float64 else "bf16"):
            logits = model(x, per_timestep=True)
        logits.square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert gradients[0]["blocks.0.conv1.conv.weight"].abs().max() > 0
    for key, value in gradients[0].items():
        assert torch.equal(gradients[1][key], value), key
        if dtype == torch.float64:
            scale = value.abs().max().clamp(min=1)
            assert (gradients[2][key] - value).abs().max() < 1e-8 * scale, key


def test_a_relu_network_is_what_it_begins_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(theirs, tmp_path / "r18.pth")
    arguments = [str(tmp_path / "r18.pth"), "--model", "psn_sew_resnet18", "--from", "torchvision"]
    assert convert([*arguments, "--output", str(tmp_path / "begin.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "102 of 143 tensors" in said
    assert "initialised: 41 tensors that a ReLU network has not, such as offsets" in said
    with torch.device("meta"):
        model = timm.create_model("psn_sew_resnet18", num_classes=7)
    found = foreign.convert(theirs, "torchvision", model)
    names = foreign._names(model)
    for key, value in found.weights.items():
        if key not in found.initialised:
            assert torch.equal(value, theirs[names[key]]), key
    assert (found.missing, found.unexpected) == ([], [])
    # What is really missing is not excused by it.
    del theirs["layer1.0.bn1.weight"]
    assert len(foreign.convert(theirs, "torchvision", model).missing) == 1


def test_which_timesteps_it_runs() -> None:
    with pytest.raises(UserError, match=r"psn has weights for T=3 alone"):
        small().set_timesteps(2)
    model = small(neuron={"kind": "lif"}).eval()
    whole = model(images(torch.float32), per_timestep=True)
    model.set_timesteps(2)
    assert torch.equal(model(images(torch.float32), per_timestep=True), whole[:2])
    with pytest.raises(UserError, match="has none for 4; build it with timesteps=4"):
        model.set_timesteps(4)
    # A segment sees the offsets of its own timesteps.
    model.set_timesteps(3)
    model.set_segment(1)
    model.train()
    first = model(images(torch.float32), per_timestep=True)
    with torch.no_grad():
        model.offsets[2] += 5
    assert torch.equal(model(images(torch.float32), per_timestep=True)[:2], first[:2])
    assert not torch.equal(model(images(torch.float32), per_timestep=True)[2], first[2])


def test_nir_has_no_node_for_its_offsets() -> None:
    with pytest.raises(UserError, match="psn_sew_resnet18 adds a number of its own to the image"):
        to_nir(small(neuron={"kind": "lif"}), (3, 64, 64))
