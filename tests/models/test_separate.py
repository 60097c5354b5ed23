"""No sample sees another: networks from outside that mix a batch's samples are refused."""

import re
import threading
from dataclasses import dataclass

import pytest
import timm
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

from tetdist import models
from tetdist.errors import UserError
from tetdist.models.adopted import adopt
from tetdist.models.separate import refuse_mixing
from tetdist.nn import neurons
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron

pytestmark = pytest.mark.usefixtures("one_thread")

T, CLASSES, SHAPE = 2, 5, (3, 16, 16)


# ------------------------------------------------------------------------------ our own networks

# By the beginning of a name: what makes the network small.
SMALLER = {
    "qkformer_2": {"widths": (16, 16), "depths": (1, 1), "heads": 2},
    "qkformer": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "ms_qkformer_2": {"widths": (16, 16), "depths": (1, 1), "heads": 2},
    "ms_qkformer": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "maxformer": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "espikeformer": {"widths": (8, 8, 8, 16), "depths": (1, 1), "heads": 2},
    "sdt": {"channels": 16, "depth": 1},
    "spiking_convnet": {"channels": (4, 6, 8), "input_size": 16},
    "spiking_resnet19_dvs": {"width": 4, "stem_width": 4, "input_size": 16},
    "vggsnn": {"input_size": 16},
    "": {"width": 4},
}


def own(name, **arguments):
    """One of our networks, small, and the shape of its samples."""
    torch.manual_seed(0)
    smaller = next(values for start, values in SMALLER.items() if name.startswith(start))
    model = timm.create_model(name, num_classes=CLASSES, **smaller, **arguments)
    if not name.startswith("psn"):  # has weights for each timestep
        model.set_timesteps(T)
    side = model.input_size or 32
    return model, (3, side, side) if model.input_kind == "images" else (T, 2, side, side)


OWN = [name for name in models.names() if timm.model_entrypoint(name).__module__ < "tetdist_"]


@pytest.mark.parametrize("name", OWN)
def test_our_own_networks_keep_samples_apart(name):
    refuse_mixing(name, *own(name))


@pytest.mark.parametrize("name", [name for name in OWN if name.startswith("qkformer")])
def test_published_defect_is_found_in_the_whole_network(name):
    complaint = rf"blocks\.\d\.attention\.proj\.neuron \(NormNeuron\) of {name} mixes the samples"
    with pytest.raises(UserError, match=complaint):
        # So few positions need a lower threshold than all.
        refuse_mixing(name, *own(name, mixes_samples=True, attention_threshold=0.25))


# --------------------------------------------------------------------------- networks from outside


class Plain(nn.Module):
    """A network of plain torch around layers that see (T * B, C, H, W) or (T, B, C, H, W)."""

    input_kind = "images"

    def __init__(self, *layers, folded=True):
        super().__init__()
        self.num_classes, self.timesteps, self.folded = CLASSES, T, folded
        self.layers = nn.Sequential(*layers)
        self.fc = nn.LazyLinear(CLASSES)
        with torch.no_grad():
            self(torch.zeros(2, 3, 16, 16))

    def forward(self, x, per_timestep=False):
        x = x.repeat(T, 1, 1, 1, 1)
        x = self.layers(x.flatten(0, 1)).unflatten(0, (T, -1)) if self.folded else self.layers(x)
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


class Attention(nn.Module):
    """Self-attention as QKFormer, MSViT and SGLFormer have published it, of spikingjelly's parts.

    The last neurons get (T * B, C, N) instead of (T, B, C, N).
    """

    def __init__(self, *, mixes):
        super().__init__()
        self.mixes = mixes
        self.stem = layer.SeqToANNContainer(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.lif = neuron.LIFNode(step_mode="m")
        for name in ("q", "k", "v", "proj"):
            self.add_module(f"{name}_conv", nn.Conv1d(8, 8, 1, bias=name == "proj"))
            self.add_module(f"{name}_bn", nn.BatchNorm1d(8))
            self.add_module(f"{name}_lif", neuron.LIFNode(step_mode="m"))
        self.attn_lif = neuron.LIFNode(step_mode="m", v_threshold=0.5)
        self.head = layer.Linear(8, CLASSES, step_mode="m")

    def part(self, name, x):
        return self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(x))

    def forward(self, x):
        x = self.lif(self.stem(x)).flatten(3)
        flat, shape = x.flatten(0, 1), x.shape[:2]
        q, k, v = (
            self.get_submodule(f"{name}_lif")(self.part(name, flat).unflatten(0, shape))
            for name in "qkv"
        )
        attended = self.attn_lif(v @ (k.mT @ q) * 0.125)
        current = self.part("proj", attended.flatten(0, 1))
        if not self.mixes:
            current = current.unflatten(0, shape)
        return self.head((x + self.proj_lif(current).reshape(x.shape)).mean(3))


def attention(*, mixes):
    return adopt(Attention(mixes=mixes), timesteps=T, num_classes=CLASSES)


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
        self.over = nn.Softmax(0)

    def forward(self, x):
        return x + self.gain * self.over(x)


def over_batch(x):
    return x - x.mean(1, keepdim=True)


def silent():
    """Without norms, too weak for its third layer of neurons before it is trained."""
    layers = []
    for channels in (3, 8):
        layers += [layer.SeqToANNContainer(conv(channels)), Neuron(LIF())]
    return Plain(*layers, layer.SeqToANNContainer(conv(8)), Neuron(OverTheBatch()), folded=False)


class Integrate(nn.Module):
    """Neurons around a surrogate function, as a library's are."""

    def __init__(self):
        super().__init__()
        self.surrogate = Function(lambda x: x.ge(0).to(x))

    def forward(self, x):
        return self.surrogate(x.cumsum(0) - 200)


class Beside(nn.Module):
    """A branch that is silent before training, beside a real-valued shortcut.

    Its last neurons get (T * B, ...) instead of (T, B, ...).
    """

    def __init__(self, make):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(BatchNorm(3) for _ in range(4))
        self.lifs = nn.ModuleList(make() for _ in range(4))

    def forward(self, x):
        branch = x
        for conv, norm, lif in zip(self.convs, self.norms, self.lifs, strict=True):
            current = norm(conv(branch))
            if lif is not self.lifs[-1]:
                current = current.unflatten(0, (T, -1))
            branch = lif(current).view_as(x)
        return x + branch


def of_four(x):
    groups = x.unflatten(1, (-1, 4)) if x.shape[1] % 4 == 0 else x[:, :, None]
    return (groups - groups.mean(2, keepdim=True)).flatten(1, 2)


def single(x):
    if x.dtype != torch.float32:
        raise RuntimeError(f"expected float32, not {x.dtype}")
    return x


MIXING = {
    "membrane over the batch": (lambda: attention(mixes=True), r"net\.proj_lif \(LIFNode\)"),
    "neuron of the user's": (
        lambda: own("sew_resnet18", neuron=OverTheBatch(threshold=0.5))[0],
        r"stem\.neuron \(NormNeuron\)",
    ),
    "batch statistics": (
        lambda: Plain(conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()),
        r"layers\.1 \(BatchNorm2d\)",
    ),
    "norm over the batch": (
        lambda: Plain(layer.SeqToANNContainer(conv()), Function(over_batch), folded=False),
        r"layers\.1 \(Function\)",
    ),
    "between modules": (
        lambda: Plain(Function(lambda x: x.softmax(0)), conv()),
        r"layers\.0 \(Function\)",
    ),
    "samples taken for timesteps": (
        lambda: Plain(conv(), Function(lambda x: x.unflatten(0, (-1, T)).cumsum(1).flatten(0, 1))),
        r"layers\.1 \(Function\)",
    ),
    "branch that is switched off": (lambda: Plain(conv(), Branch()), r"layers\.1.* \((Softmax|Br)"),
    "silent before training": (silent, r"layers\.5 \(Neuron\)"),
    "silent beside a shortcut": (
        lambda: Plain(Beside(lambda: Neuron(LIF(threshold=200.0)))),
        r"layers\.0\.lifs\.3 \(Neuron\)",
    ),
    "silent around a surrogate": (
        lambda: Plain(Beside(Integrate)),
        r"layers\.0\.lifs\.3 \(Integrate\)",
    ),
    "from three samples on": (
        lambda: Plain(Function(lambda x: x + x.roll(2, 1)), folded=False),
        r"layers\.0 \(Function\)",
    ),
    "four samples": (
        lambda: Plain(layer.SeqToANNContainer(conv()), Function(of_four), folded=False),
        r"layers\.1 \(Function\)",
    ),
    "in float32 alone": (
        lambda: Plain(Function(single), conv(), nn.Softmax(0)),
        r"layers\.2 \(Softmax\)",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_network_is_refused_by_module(name):
    make, module = MIXING[name]
    torch.manual_seed(0)
    model = make()
    with pytest.raises(UserError, match=rf"^{module}.* of toy mixes the samples of a batch, so"):
        refuse_mixing("toy", model, SHAPE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: attention(mixes=False),
        lambda: Plain(conv(), BatchNorm(8), nn.ReLU()),
        lambda: Plain(Function(single), conv(), nn.GroupNorm(2, 8)),
    ],
)
def test_others_are_accepted_and_unchanged(make):
    model = make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    refuse_mixing("toy", model, SHAPE)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_noise_is_refused_and_what_cannot_run_is_reported(caplog):
    with pytest.raises(UserError, match="toy draws random numbers in evaluation mode"):
        refuse_mixing("toy", Plain(conv(), Function(lambda x: x + torch.rand_like(x))), SHAPE)
    refuse_mixing("toy", Plain(conv()), (2, 16, 16))
    assert re.search("toy cannot be checked .* to have 3 channels", caplog.text)


def test_silent_layer_is_named_and_what_cannot_be_copied_refused(caplog):
    refuse_mixing("toy", Plain(conv(), Neuron(LIF()), Function(torch.zeros_like), conv(8)), SHAPE)
    assert "layers.2 (Function) of toy is silent for random samples" in caplog.text
    model = Plain(conv())
    model.lock = threading.Lock()
    with pytest.raises(UserError, match=r"toy cannot be copied .* model\.mixes_samples=true"):
        refuse_mixing("toy", model, SHAPE)
