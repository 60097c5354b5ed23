"""Products of spikes: exact sums, and bytes kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_runs import kept_tensors
from torch import Tensor

from tetdist.nn.packed import carried, carry, pack
from tetdist.nn.products import HeadSum, LinearAttention, PositionSum, masked

pytestmark = pytest.mark.usefixtures("one_thread")


def spikes(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, levels: int = 1
) -> Tensor:
    """Spikes (T, B, C, H, W), channels last in memory, that carry their bytes."""
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.rand(*shape, generator=generator) * (levels + 1)).floor() / levels).to(dtype)
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    x.requires_grad_()
    return carry(x, pack(x.detach(), levels))


SHAPE = (2, 3, 12, 4, 5)
MASK = (2, 3, 4, 4, 5)  # of heads
CHANNELS = (2, 3, 12, 1, 1)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (LinearAttention(4, 0.3), (SHAPE,) * 3),
    "positions": (PositionSum(), (SHAPE,) * 2),
    "heads": (HeadSum(4), (SHAPE,)),
    "mask of heads": (masked, (SHAPE, MASK)),
    "mask of channels": (masked, (SHAPE, CHANNELS)),
}


def plain(name: str, *inputs: Tensor) -> Tensor:
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
def test_is_the_definition(name: str, levels: int | None) -> None:
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
        packed = carried(y)
        assert packed is not None
        assert torch.equal(packed.unpack(y.dtype), y)


@pytest.mark.parametrize("name", ["attention", "positions", "mask of heads", "mask of channels"])
def test_keeps_bytes_alone(name: str) -> None:
    function, shapes = CASES[name]
    with kept_tensors() as kept:
        function(*(spikes(*shape, seed=i) for i, shape in enumerate(shapes)))
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert sum(tensor.numel() for tensor in kept) == sum(
        torch.Size(shape).numel() for shape in shapes
    )


@pytest.mark.parametrize("carries", [True, False], ids=["bytes", "numbers"])
def test_sums_are_exact_under_autocast(carries: bool) -> None:
    """Sums over 32x32 positions and 32 channels a head: up to 32768, where bfloat16's step is
    256."""
    inputs = [spikes(1, 1, 64, 32, 32, seed=i, dtype=torch.bfloat16) for i in range(3)]
    if not carries:
        inputs = [x.detach().requires_grad_() for x in inputs]
    functions: list[tuple[Callable[..., Tensor], int]] = [
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


def test_nothing_is_transposed_in_memory() -> None:
    """The output is channels last, like the input."""
    inputs: list[Any] = [spikes(*SHAPE, seed=i) for i in range(3)]
    for y in (
        LinearAttention(4)(*inputs),
        masked(inputs[0], spikes(*MASK, seed=4)),
        masked(inputs[0], spikes(*CHANNELS, seed=4)),
    ):
        assert y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
