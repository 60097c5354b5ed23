"""SEW-ResNets with parallel spiking neurons: bytes, initial weights, and T."""

import pytest
import timm
import torch
import torchvision

from tetdist.apps.cli.convert import main as convert
from tetdist.apps.weights import foreign
from tetdist.apps.weights.nir_graph import to_nir
from tetdist.errors import UserError
from tetdist.models import PSNSEWResNet
from tetdist.nn.norm_neuron import spiking_layers
from tetdist.nn.parallel_neurons import PSN
from tetdist.nn.precision import autocast

pytestmark = pytest.mark.usefixtures("one_thread")

T = 3


def small(**arguments):
    torch.manual_seed(0)
    arguments = {
        "width": 4,
        "num_classes": 5,
        "timesteps": T,
        "neuron": {"timesteps": T},
    } | arguments
    return timm.create_model("psn_sew_resnet18", **arguments)


def images(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=dtype)


@pytest.mark.parametrize("connect", ["add", "and"])
def test_means_are_not_kept_in_bytes(connect):
    """Ninths do not fit into bytes: gradients are bitwise those of a recomputed network."""
    model, x = small(width=8, connect_function=connect).train(), images(torch.float32)
    with torch.no_grad():
        for layer in spiking_layers(model).values():
            layer.learned["bias"].fill_(1)  # so that products of spikes are not all 0
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        with autocast(x.device, "bf16"):
            logits = model(x, per_timestep=True)
        logits.square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    assert gradients[0]["blocks.0.conv1.conv.weight"].abs().max() > 0
    assert [k for k, v in gradients[0].items() if not torch.equal(gradients[1][k], v)] == []


def test_a_relu_network_is_what_it_begins_with(tmp_path, capsys):
    theirs = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.save(theirs, tmp_path / "r18.pth")
    arguments = [str(tmp_path / "r18.pth"), "--model", "psn_sew_resnet18", "--from", "torchvision"]
    assert convert([*arguments, "--output", str(tmp_path / "begin.safetensors")]) == 0
    output = capsys.readouterr().out
    assert "102 of 143 tensors" in output
    assert "initialised: 41 tensors that a ReLU network lacks, such as offsets" in output
    with torch.device("meta"):
        model = timm.create_model("psn_sew_resnet18", num_classes=7)
    found = foreign.convert(theirs, "torchvision", model)
    names = foreign._names(model)
    for key, value in found.weights.items():
        if key not in found.initialised:
            assert torch.equal(value, theirs[names[key]]), key
    assert (found.missing, found.unexpected) == ([], [])
    # Really missing tensors are still refused.
    del theirs["layer1.0.bn1.weight"]
    assert len(foreign.convert(theirs, "torchvision", model).missing) == 1


def test_which_timesteps_it_runs():
    assert PSNSEWResNet.default_neuron == PSN(timesteps=4)
    with pytest.raises(UserError, match=r"psn cannot run 2 timesteps: it has weights for T=3 only"):
        small().set_timesteps(2)
    model = small(neuron={"kind": "lif"}).eval()
    whole = model(images(torch.float32), per_timestep=True)
    model.set_timesteps(2)
    assert torch.equal(model(images(torch.float32), per_timestep=True), whole[:2])
    with pytest.raises(UserError, match="only, not for 4; build it with timesteps=4"):
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


def test_nir_has_no_node_for_its_offsets():
    with pytest.raises(UserError, match="psn_sew_resnet18 adds a learnt number to the image"):
        to_nir(small(neuron={"kind": "lif"}), (3, 64, 64))
