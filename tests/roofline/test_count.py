"""What a network asks of a GPU: counted, against the kernels' own code and against measurements."""

import math
import sys
from collections import Counter

import pytest
import timm
import torch
from kernel_runs import needs_triton
from torch import nn

from tetdist import models
from tetdist.apps.roofline.count import CONVOLUTIONS, count
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron, NormNeuron
from tetdist.nn.packed import Conv2d, carry, pack
from tetdist.nn.products import LinearAttention

needs_triton()

SMALL = (2, 3, 64, 64)


def network(name="sew_resnet18", **arguments):
    return timm.create_model(name, **{"timesteps": 4, "num_classes": 10} | arguments)


def shape_of(model, batch=2):
    *_, channels, height, width = model.default_cfg["input_size"]
    height, width = min(height, 64), min(width, 64)
    bins = (model.timesteps,) if model.input_kind == "events" else ()
    return (batch, *bins, channels, height, width)


def bytes_of(work):
    return sum(kernel.bytes for kernel in work.kernels)


def operations_of(work):
    return sum(kernel.operations for kernel in work.kernels)


# The first name of each file of networks.
NAMES = sorted(models.names(), reverse=True)
OF_EACH_FILE = {timm.model_entrypoint(name).__module__: name for name in NAMES}


@pytest.mark.parametrize("name", OF_EACH_FILE.values())
def test_every_family_is_counted(name):
    model = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    work = count(model, shape_of(model), "bf16")
    assert operations_of(work) > 0
    assert bytes_of(work) > 0
    launches = Counter(kernel.name for kernel in work.kernels)
    # All heads are small enough, except in E-SpikeFormer-L's last two blocks.
    attentions = sum(isinstance(module, LinearAttention) for module in model.modules())
    expected = attentions - 2 * (name == "espikeformer_l")
    assert launches["attention.attend"] == launches["attention.gradients"] == expected
    # Nothing of the network has changed, and it is where it was.
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class OneLayer(nn.Module):
    """A convolution and a layer of neurons, with what may come besides."""

    def __init__(self, shortcut, *, identity):
        super().__init__()
        self.first, self.second = (Conv2d(64, 64, 1, bias=False) for _ in range(2))
        self.neuron = NormNeuron(64, LIF())
        self.shortcut, self.identity = shortcut, identity
        self.norm = BatchNorm(64) if shortcut == "normalized" else None

    def forward(self, x):
        x = x.expand(4, *x.shape).clone(memory_format=torch.preserve_format)
        added = None if self.shortcut == "none" else self.second(x)
        identity = None
        if self.identity:  # spikes, which carry their bytes
            identity = self.second(x)
            carry(identity, pack(identity))
        return self.neuron(
            self.first(x), 4, shortcut=added, shortcut_norm=self.norm, identity=identity
        )


@pytest.mark.parametrize(("shortcut", "identity"), [("none", True), ("normalized", False)])
def test_bytes_are_those_of_tritons_kernels(shortcut, identity):
    import gpu_code

    layer = gpu_code.Layer(shortcut=shortcut, identity=identity)
    expected = Counter()
    for launch in layer.launches():
        timesteps = 1 if launch.name == "statistics" else 4
        if launch.name in ("statistics", "fire", "backward_sums", "backward"):
            expected[launch.name] += int(gpu_code.compiled(launch, 90).bytes_of_number(timesteps))
    shape = (2, 64, 16, 16)
    work = count(OneLayer(shortcut, identity=identity), shape, "bf16")
    numbers = 4 * 2 * 64 * 16 * 16
    found = Counter()
    for kernel in work.kernels:
        name = kernel.name.removeprefix("neuron.")
        if name in expected:
            found[name] += round(kernel.bytes / numbers)
    assert found == expected


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.products, self.neuron = LinearAttention(1), Neuron(LIF(), 64)

    def forward(self, x):
        x = x.expand(4, *x.shape).clone(memory_format=torch.preserve_format).requires_grad_()
        carry(x, pack(x))
        return self.products.fired(x, x, x, self.neuron)


def test_work_of_attention_is_that_of_its_products():
    images, numbers = (2, 64, 8, 8), 4 * 2 * 64 * 64
    kernels = {one.name: one for one in count(Attention(), images, "bf16").kernels}
    products = 4 * numbers * 64  # operations of two, forward
    for name, operations, bytes_of_number in (
        ("attend", products, 3 + 2 + 1),  # q, k, v; spikes, and the same in bytes
        ("current_gradient", products, 3 + 2 + 2),
        ("gradients", 2.5 * products, 3 + 2 + 3 * 2),  # k^T v again
    ):
        kernel = kernels[f"attention.{name}"]
        assert (kernel.operations, kernel.bytes) == (operations, bytes_of_number * numbers), name


def test_memory_is_what_autograd_keeps_in_truth():
    """MiB an image, of sew_resnet34 in bfloat16: docs/performance.md, "Scaling with T"."""
    model = network("sew_resnet34", num_classes=1000)
    size = (3, 224, 224)

    def of_an_image():
        two, four = (count(model, (batch, *size), "bf16").peak_bytes for batch in (2, 4))
        return (four - two) / 2 / 2**20

    assert of_an_image() == pytest.approx(36.2, rel=0.05)
    model.set_timesteps(8)
    assert of_an_image() == pytest.approx(70.6, rel=0.05)


def test_operations_are_those_of_the_definition():
    """Three times the forward pass's, but for the gradient of the image."""
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 16 * 16, 7))
    work = count(layers, (5, 3, 32, 32), "fp32")
    first = 2 * 5 * 32 * 32 * 8 * 3 * 9
    second = 2 * 5 * 16 * 16 * 16 * 8 * 9
    head = 2 * 5 * 16 * 16 * 16 * 7
    assert operations_of(work) == 2 * first + 3 * second + 3 * head


class Expands(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x.expand(4, *x.shape) * self.weight


def test_of_an_expanded_tensor_each_number_is_read_once():
    product = count(Expands(), SMALL, "fp32").kernels[0]
    numbers = math.prod(SMALL)
    assert (product.name, product.bytes) == ("mul", 4 * (numbers + 1 + 4 * numbers))


def test_recomputing_takes_work_and_spares_memory():
    model = network()
    plain = count(model, SMALL, "bf16")
    model.set_grad_checkpointing(True)
    blocks = count(model, SMALL, "bf16")
    model.set_segment(2)
    segments = count(model, SMALL, "bf16")
    assert bytes_of(plain) < bytes_of(blocks) < bytes_of(segments)
    assert operations_of(plain) < operations_of(blocks) < operations_of(segments)
    assert blocks.peak_bytes < plain.peak_bytes


def test_work_grows_with_what_is_asked_for():
    model = network()
    plain = count(model, SMALL, "bf16")
    twice = count(model, (4, 3, 64, 64), "bf16")
    assert operations_of(twice) == 2 * operations_of(plain)
    assert bytes_of(plain) < bytes_of(twice) < 2 * bytes_of(plain)  # the weights are the same
    wide = count(model, SMALL, "fp32")
    assert operations_of(wide) == operations_of(plain)
    assert bytes_of(wide) > 1.7 * bytes_of(plain)
    model.set_timesteps(8)
    longer = count(model, SMALL, "bf16")
    # But for the stem, which all timesteps share.
    assert 1.8 < operations_of(longer) / operations_of(plain) < 2


def test_definitions_move_more_than_the_kernels():
    model = network()
    fused = count(model, SMALL, "bf16")
    model.set_execution("reference")
    reference = count(model, SMALL, "bf16")
    assert bytes_of(reference) > 3 * bytes_of(fused)
    of_convolutions = [
        sum(kernel.operations for kernel in work.kernels if kernel.kind == CONVOLUTIONS)
        for work in (fused, reference)
    ]
    assert of_convolutions[0] == of_convolutions[1]


class AsksForNumbers(nn.Module):
    def forward(self, x):
        return x * float(x.mean())


def test_a_network_that_asks_for_numbers_is_named():
    with pytest.raises(UserError, match="the work of AsksForNumbers cannot be counted"):
        count(AsksForNumbers(), SMALL, "bf16")


def test_counting_leaves_nothing_behind():
    from tetdist.nn.fast import triton_kernels

    before = triton_kernels.launch
    with pytest.raises(UserError):
        count(AsksForNumbers(), SMALL, "bf16")
    assert dispatch.triton_for(torch.empty(1, device="meta")) is None
    assert triton_kernels.launch is before
    model = network()
    assert count(model, SMALL, "bf16") == count(model, SMALL, "bf16")


def test_without_triton_the_way_out_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"needs Triton.*pip install 'triton"):
        count(nn.Linear(1, 1), (1, 1), "fp32")
