"""Products of spikes: exact sums, and bytes kept for the backward pass."""

import dataclasses
import itertools

import pytest
import torch
from kernel_runs import interpreted, kept_tensors

from tetdist.models.attention import HALVING_NEURON
from tetdist.nn.integer_neurons import ILIF, NILIF
from tetdist.nn.learned_decay import PLIF
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import Neuron, carrying_membranes
from tetdist.nn.packed import pack, packed_of, with_packed
from tetdist.nn.products import HeadSum, LinearAttention, PositionSum, masked

pytestmark = pytest.mark.usefixtures("one_thread")


def spikes(*shape, seed=0, dtype=torch.float64, levels=1, most=None):
    """Spikes (T, B, C, H, W), channels last in memory, that carry their bytes, of at most ``most``
    (by default levels)."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(*shape, generator=generator) * ((most or levels) + 1)).floor()
    x = (numbers / levels).to(dtype)
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    x.requires_grad_()
    return with_packed(x, pack(x.detach(), levels))


SHAPE = (2, 3, 12, 4, 5)
MASK = (2, 3, 4, 4, 5)  # of heads
CHANNELS = (2, 3, 12, 1, 1)
CASES = {
    "attention": (LinearAttention(4, 0.3), (SHAPE,) * 3),
    "positions": (PositionSum(), (SHAPE,) * 2),
    "heads": (HeadSum(4), (SHAPE,)),
    "mask of heads": (masked, (SHAPE, MASK)),
    "mask of channels": (masked, (SHAPE, CHANNELS)),
}


def plain(name, *inputs):
    """The definition, in torch's terms."""
    if name == "attention":
        q, k, v = (x.flatten(3).unflatten(2, (4, 3)) for x in inputs)  # (T, B, heads, d, N)
        y = torch.einsum("tbhin,tbhim,tbhjm->tbhjn", q, k, v) * 0.3
        return y.flatten(2, 3).unflatten(3, inputs[0].shape[3:])
    if name == "positions":
        return (inputs[0] * inputs[1]).sum((3, 4), keepdim=True)
    if name == "heads":
        return inputs[0].unflatten(2, (4, 3)).sum(3)
    x, mask = inputs
    if mask.shape[2] == 4:
        mask = mask.repeat_interleave(3, dim=2)
    return x * mask


@pytest.mark.parametrize("levels", [1, 4, None], ids=["bytes", "bytes of quarters", "numbers"])
@pytest.mark.parametrize("name", CASES)
def test_is_the_definition(name, levels):
    function, shapes = CASES[name]
    inputs = [spikes(*shape, seed=i, levels=levels or 1) for i, shape in enumerate(shapes)]
    if levels is None:
        inputs = [x.detach().requires_grad_() for x in inputs]
    y, expected = function(*inputs), plain(name, *inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    found = torch.autograd.grad((y * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    if name.startswith("mask") and levels == 1:
        packed = packed_of(y)
        assert torch.equal(packed.unpack(y.dtype), y)


@pytest.mark.parametrize("name", ["attention", "positions", "mask of heads", "mask of channels"])
def test_keeps_bytes_alone(name):
    function, shapes = CASES[name]
    with kept_tensors() as kept:
        function(*(spikes(*shape, seed=i) for i, shape in enumerate(shapes)))
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert sum(tensor.numel() for tensor in kept) == sum(
        torch.Size(shape).numel() for shape in shapes
    )


@pytest.mark.parametrize("carries", [True, False], ids=["bytes", "numbers"])
def test_sums_are_exact_under_autocast(carries):
    """Sums over 32x32 positions and 32 channels a head: up to 32768, where bfloat16's step is
    256."""
    inputs = [spikes(1, 1, 64, 32, 32, seed=i, dtype=torch.bfloat16) for i in range(3)]
    if not carries:
        inputs = [x.detach().requires_grad_() for x in inputs]
    functions = [
        (LinearAttention(2, 0.125), 3),
        (PositionSum(), 2),
        (HeadSum(2), 1),
    ]
    for function, count in functions:
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*inputs[:count])
        assert y.dtype == torch.float32
        expected = function(*(x.detach().double() for x in inputs[:count]))
        assert torch.equal(y.double(), expected)
        if count > 1:
            assert not torch.equal(y.bfloat16().double(), expected)
        (gradient, *_) = torch.autograd.grad(y.sum(), inputs[:count])
        assert gradient.dtype == torch.bfloat16


# Numbers of spikes that reach about the threshold.
HARD = dataclasses.replace(HALVING_NEURON, threshold=64.0, surrogate_width=0.05)
SOFT = LIF(decay=0.5, threshold=64, reset="soft", surrogate="atan", surrogate_width=0.05)
LEARNED = PLIF(threshold=32, reset="soft", decay_input=False, surrogate_width=32)
SCALED = PLIF(threshold=2, surrogate_width=2)
# A neuron; timesteps, heads, channels of queries and of values in a head, height and width; whether
# membranes are carried.
FIRED = {
    "hard": (HARD, (4, 2, 32, 32, 7, 7), True),
    "soft": (SOFT, (3, 2, 16, 40, 5, 13), True),
    "plif, soft": (LEARNED, (5, 1, 9, 11, 4, 17), True),
    # k^T v is up to 15^2 x 20, and 8^2 x 49 in eighths: two parts in float16.
    "ilif": (ILIF(most_spikes=15, threshold=2.0**14), (2, 1, 16, 16, 4, 5), True),
    "nilif": (NILIF(most_spikes=8, threshold=16), (4, 1, 30, 33, 7, 7), False),
    "plif, scaled input": (SCALED, (3, 1, 9, 11, 3, 5), True),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(FIRED, itertools.cycle((torch.bfloat16, torch.float16)))),
    ids=str,
)
def test_triton_computes_attention_and_its_neurons(name, dtype, monkeypatch):
    """Exact sums, hence the spikes and membranes of float64; gradients up to the type's rounding.

    Spikes that are not in bytes, and whose channels are not last in memory, give the same.
    """
    neuron, (timesteps, heads, channels, values, *size), carries = FIRED[name]
    levels, most = neuron.levels or 1, neuron.highest * (neuron.levels or 1)
    shapes = [(timesteps, 2, heads * one, *size) for one in (channels, channels, values)]
    options = {"levels": levels, "most": most, "dtype": dtype}
    inputs = [spikes(*shape, seed=i, **options) for i, shape in enumerate(shapes)]
    for x in inputs[1:]:  # Most keys and values are as large as they can be.
        with torch.no_grad():
            x[..., x.shape[-1] // 2 :] = most / levels
        with_packed(x, pack(x.detach(), levels))
    layer, attention = Neuron(neuron).train(), LinearAttention(heads, 0.125)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randint(-8, 8, shapes[2], generator=generator) / 4
    start = weight[0].contiguous(memory_format=torch.channels_last)

    def results(dtype, inputs):
        leaves = dict(zip("qkv", inputs, strict=True))
        if carries:
            wide = torch.promote_types(dtype, torch.float32)
            leaves["start"] = start.to(wide).requires_grad_()
        carrying = [leaves["start"]] if carries else None
        leaves |= {f"learned {key}": value for key, value in layer.named_parameters()}
        with carrying_membranes([layer] if carries else [], carrying) as ends:
            y = attention.fired(*inputs, layer)
            ended = ends()
        found = {"spikes": y} | dict(zip(["end"], ended, strict=False))
        total = (y * weight.to(dtype)).sum(dtype=torch.float64)
        for end in ended:
            total = total + (end * weight[0]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return found | dict(zip(leaves, gradients, strict=True))

    with interpreted(), monkeypatch.context() as patch:
        patch.setattr(LinearAttention, "of", None)
        found = results(dtype, inputs)
        packed = packed_of(found["spikes"])
        assert torch.equal(packed.unpack(dtype), found["spikes"])
        carriers, starts = ([layer], [start]) if carries else ([], None)
        with torch.no_grad(), carrying_membranes(carriers, starts):
            numbers = attention.fired(*(x.detach().contiguous() for x in inputs), layer)
    assert torch.equal(numbers, found["spikes"])
    assert packed_of(numbers) is None
    layer.double().execution = "reference"
    expected = results(torch.float64, [x.detach().double().requires_grad_() for x in inputs])
    assert expected["spikes"].std() > 0.03 * most / levels
    for key, right in expected.items():
        if key in ("spikes", "end") and not isinstance(neuron, PLIF):
            assert torch.equal(found[key].double(), right), key
        else:
            scale = right.abs().max().item()
            # The interpreter cuts bfloat16 off.
            rounding = 2**-5 if dtype == torch.bfloat16 else 2**-10
            torch.testing.assert_close(
                found[key].double(), right, rtol=0, atol=rounding * scale, msg=key
            )


@pytest.mark.parametrize(
    ("neuron", "timesteps", "channels", "side", "dtype"),
    [
        (HALVING_NEURON, 2, 16, 4, torch.float32),
        (HALVING_NEURON, 2, 65, 4, torch.bfloat16),
        (HALVING_NEURON, 9, 16, 4, torch.bfloat16),
        (ILIF(most_spikes=15), 1, 16, 40, torch.float16),
        (NILIF(most_spikes=8), 1, 2, 257, torch.bfloat16),
    ],
    ids=["type", "channels", "timesteps", "float16's largest", "exact sums"],
)
def test_what_triton_cannot_compute_exactly_is_computed_by_the_definition(
    neuron, timesteps, channels, side, dtype, monkeypatch
):
    x = torch.zeros(timesteps, 1, channels, side, side, dtype=dtype)
    launched = []
    with interpreted():
        from tetdist.nn.fast import triton_kernels

        monkeypatch.setattr(triton_kernels, "launch", lambda one, *_: launched.append(one.__name__))
        y = LinearAttention(1, 0.125).fired(x, x, x, Neuron(neuron).train())
    assert y.dtype == dtype
    assert "attend" not in launched
