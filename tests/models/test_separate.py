"""No sample sees another: networks from outside that mix a batch's samples are refused."""

import re
import threading
from dataclasses import dataclass

import pytest
import timm
import torch
from adopted_networks import Small
from spikingjelly.activation_based import layer, neuron
from test_models import SMALL, create, inputs_for
from torch import nn

from tetdist.errors import UserError
from tetdist.models.adopted import adopt
from tetdist.models.separate import check_network
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron

pytestmark = pytest.mark.usefixtures("one_thread")

T, CLASSES, SHAPE = 2, 4, (3, 16, 16)


@pytest.mark.parametrize("name", ["sew_resnet18", "sdt_2_256_cifar"])
def test_our_own_networks_keep_samples_apart(name):
    check_network(name, create(name), inputs_for(name).shape[1:])


def test_published_defect_is_found_in_the_whole_network():
    name = "qkformer_4_384_cifar"
    options = {"num_classes": 5, "mixes_samples": True, "attention_threshold": 0.25}
    with pytest.raises(UserError, match=f"{name} mixes the samples of a batch"):
        # So few positions need a lower threshold than all.
        check_network(name, timm.create_model(name, **SMALL[name], **options), (3, 32, 32))


class Plain(nn.Module):
    """A network of plain torch around layers that see (T * B, C, H, W) or (T, B, C, H, W)."""

    input_kind = "images"

    def __init__(self, *layers, is_folded=True):
        super().__init__()
        self.num_classes, self.timesteps, self.is_folded = CLASSES, T, is_folded
        self.layers = nn.Sequential(*layers)
        self.fc = nn.LazyLinear(CLASSES)
        with torch.no_grad():
            self(torch.zeros(2, 3, 16, 16))

    def set_timesteps(self, timesteps):
        self.timesteps = timesteps

    def forward(self, x, per_timestep=False):
        x = x.repeat(self.timesteps, 1, 1, 1, 1)
        of_all = (self.timesteps, -1)
        x = self.layers(x.flatten(0, 1)).unflatten(0, of_all) if self.is_folded else self.layers(x)
        logits = self.fc(x.mean((3, 4)))
        return logits if per_timestep else logits.mean(0)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def conv(channels=3):
    return nn.Conv2d(channels, 8, 3)


def folded(module):
    return layer.SeqToANNContainer(module)


def librarys(*, mixes):
    """A network of spikingjelly whose first neurons may go on from each sample to the next."""
    net = Small(CLASSES)
    if mixes:
        lif = neuron.LIFNode(step_mode="m", v_threshold=0.3)
        net.features[2] = Function(lambda x: lif(x.flatten(0, 1)[:, None]).view_as(x))
        net.features[2].lif = lif
    return adopt(net, timesteps=T, num_classes=CLASSES)


@dataclass(frozen=True, kw_only=True)
class OverTheBatch(LIF):
    """LIF whose membrane goes on from each sample to the next."""

    def run(self, current, *_, **_learned):
        spikes, end = neurons.run(current.flatten(0, 1)[:, None], self, None)
        return spikes.view_as(current), end


class Branch(nn.Module):
    """A branch that a gain of zero switches off before training, and that mixes."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gain * x.softmax(0)


def silent():
    """Without norms, too weak for its third layer of neurons before it is trained."""
    layers = [folded(conv()), Neuron(LIF()), folded(conv(8)), Neuron(LIF())]
    return Plain(*layers, folded(conv(8)), Neuron(OverTheBatch()), is_folded=False)


def of_four(x):
    groups = x.unflatten(1, (-1, 4)) if x.shape[1] % 4 == 0 else x[:, :, None]
    return (groups - groups.mean(2, keepdim=True)).flatten(1, 2)


def over_time(x):
    return x.unflatten(0, (-1, T)).cumsum(1).flatten(0, 1)


def single(x):
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected float32, not {x.dtype}")
    return x


MIXING = {
    "membrane over the batch": lambda: librarys(mixes=True),
    "neuron of the user's": lambda: Plain(
        folded(conv()), Neuron(OverTheBatch(threshold=0.5)), is_folded=False
    ),
    "batch statistics": lambda: Plain(conv(), nn.BatchNorm2d(8, track_running_stats=False)),
    "between modules": lambda: Plain(Function(lambda x: x.softmax(0)), conv()),
    "by a thousandth": lambda: Plain(conv(), Function(lambda x: x + 1e-3 * x.mean(0))),
    "samples taken for timesteps": lambda: Plain(conv(), Function(over_time)),
    "branch that is switched off": lambda: Plain(conv(), Branch()),
    "silent before training": silent,
    "from three samples on": lambda: Plain(Function(lambda x: x + x.roll(2, 1)), is_folded=False),
    "four samples": lambda: Plain(folded(conv()), Function(of_four), is_folded=False),
    "in float32 alone": lambda: Plain(Function(single), conv(), nn.Softmax(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_network_is_refused(name):
    torch.manual_seed(0)
    model = MIXING[name]()
    with pytest.raises(UserError, match=r"^toy mixes the samples of a batch, so"):
        check_network("toy", model, SHAPE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: librarys(mixes=False),
        lambda: Plain(conv(), BatchNorm(8), nn.ReLU()),
        lambda: Plain(Function(single), conv(), nn.GroupNorm(2, 8)),
    ],
)
def test_others_are_accepted_and_unchanged(make, caplog):
    model = make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_network("toy", model, SHAPE)
    assert caplog.text == ""
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_noise_is_refused_and_what_cannot_be_checked_is_reported(caplog, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    noisy = Plain(conv(), Function(lambda x: x + torch.rand_like(x)))
    with pytest.raises(UserError, match="toy draws random numbers in evaluation mode"):
        check_network("toy", noisy, SHAPE)
    random = torch.get_rng_state()
    check_network("toy", noisy, SHAPE, may_mix=True)
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(RuntimeError, match="to have 3 channels") as caught:
        check_network("toy", Plain(conv()), (2, 16, 16))
    assert caught.value.__notes__ == ["in layers.0 of toy"]
    check_network("toy", Plain(conv(), Neuron(LIF()), Function(torch.zeros_like), conv(8)), SHAPE)
    assert "Function of toy is silent for random samples" in caplog.text
    model = Plain(conv())
    model.lock = threading.Lock()
    check_network("locked", model, SHAPE)
    assert re.search("locked cannot be checked .* cannot pickle", caplog.text)
