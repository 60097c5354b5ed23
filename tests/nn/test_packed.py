"""Operations on packed spikes are torch's own, in value and gradient, and keep bytes."""

import contextlib

import pytest
import timm
import torch
import torch.nn.functional as F
from kernel_runs import interpreted, kept_tensors, needs_compiler, not_native
from torch import nn

from tetdist.nn.fast import native_pool
from tetdist.nn.packed import AvgPool, Conv2d, MaxPool, pack, packed_of, with_packed
from tetdist.nn.precision import autocast

SHAPE = (3, 2, 4, 9, 7)  # (T, B, C, H, W), with an odd height


def some(levels=1, highest=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, highest * levels + 1, SHAPE, generator=generator) / levels
    # Channels last in memory, as everywhere.
    flat = values.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.unflatten(0, SHAPE[:2]).to(dtype).requires_grad_()


def in_bytes(x, levels):
    y = x * 1
    return with_packed(y, pack(x.detach(), levels))


def timewise(module, x):
    """torch's own operation on each timestep."""
    if isinstance(module, nn.Conv2d):
        y = F.conv2d(x.flatten(0, 1), module.weight, module.bias, module.stride, module.padding)
    else:
        y = module(x.flatten(0, 1))
    return y.unflatten(0, x.shape[:2])


CONVOLUTIONS = {
    "3x3": Conv2d(4, 5, 3, padding=1, bias=False),
    "strided": Conv2d(4, 5, 3, stride=2, padding=1),
    "1x1": Conv2d(4, 5, 1, stride=2, bias=False),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, levels, precision):
    conv = CONVOLUTIONS[name].to(memory_format=torch.channels_last)
    results = []
    for packed in (False, True):
        conv.zero_grad()
        x = some(levels)
        with autocast(x.device, precision):
            if packed:
                y = conv(in_bytes(x, levels))
            else:
                y = timewise(conv, x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in conv.parameters())))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("window", "size", "levels"),
    [
        ((3, 2, 1), (7, 9), 1),
        ((3, 2, 1), (2, 3), 4),
        ((2, 2, 0), (7, 9), 4),
        ((3, 1, 1), (8, 8), 1),
        ((2, 3, 1), (7, 9), 1),
        ((5, 3, 2), (8, 8), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["native", "torch", "triton"])
def test_max_pool(implementation, window, size, levels):
    """The first of equal maxima gets the gradient, as in torch."""
    if implementation == "native":
        needs_compiler(native_pool.pool())
    context = {"native": contextlib.nullcontext, "torch": not_native, "triton": interpreted}
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (3, 2, 5, *size), generator=generator) / levels
    results = []
    for packed in (False, True):
        x = values.clone().requires_grad_()
        with context[implementation]():
            if packed:
                y = MaxPool(*window)(in_bytes(x, levels))
                found = packed_of(y)
                assert torch.equal(found.unpack(torch.float32), y)
            else:
                y = timewise(nn.MaxPool2d(*window), x)
            (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", ["native", "triton"])
def test_max_pool_in_bfloat16_adds_gradients_in_float32(implementation):
    if implementation == "native":
        needs_compiler(native_pool.pool())
    x = torch.randint(0, 2, (1, 1, 70, 5, 5), generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with interpreted() if implementation == "triton" else contextlib.nullcontext():
            y = MaxPool(3, 1, 1)(in_bytes(leaf, 1))
            assert y.dtype == dtype
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
            y.backward(grad.to(dtype))
        gradients.append(leaf.grad)
    if implementation == "triton":
        # A GPU rounds; Triton's interpreter truncates bfloat16.
        torch.testing.assert_close(gradients[0], gradients[1].bfloat16(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(gradients[0], gradients[1].bfloat16())


def test_average_pool():
    results = []
    for packed in (False, True):
        x = some(highest=1)
        y = AvgPool()(in_bytes(x, 1)) if packed else timewise(nn.AvgPool2d(2), x)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y = AvgPool()(in_bytes(some(highest=1), 1))
    found = packed_of(y)
    assert found.levels == 4
    assert torch.equal(found.unpack(torch.float32), y)


@pytest.mark.parametrize("operation", ["conv", "max"])
def test_bytes_are_kept_instead_of_numbers(operation):
    module = CONVOLUTIONS["3x3"] if operation == "conv" else MaxPool(3, 2, 1)
    x = in_bytes(some(), 1)
    with kept_tensors() as kept:
        y = module(x)
    weights = {p.data_ptr() for p in module.parameters()}
    activations = [t for t in kept if t.data_ptr() not in weights]
    assert [t.dtype for t in activations] == [torch.uint8]
    assert y.requires_grad


def test_note_is_void_after_a_write():
    x = in_bytes(some(), 1)
    assert packed_of(x) is not None
    with torch.no_grad():
        x += 1
    assert packed_of(x) is None
    # And torch's own operation is used.
    conv = CONVOLUTIONS["3x3"]
    assert torch.equal(conv(x), timewise(conv, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_total_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (3, 5, 64, 20, 21), generator=generator).to(dtype) / 4
    for laid_out in (x, x.transpose(2, 4), x[..., ::2], x[:, 1:], x[:1].expand(3, -1, -1, -1, -1)):
        total = native_pool.total(laid_out)
        assert total.dtype == torch.float64
        assert total.item() == laid_out.double().sum().item()
    assert native_pool.total(x[:0]).item() == 0


def test_total_is_exact_beyond_what_float32_holds():
    """An odd number of spikes above 2^24, of identical images."""
    image = torch.ones(7, 1, 1, 1, 1).expand(-1, 1, 3, 1001, 801)
    assert native_pool.total(image).item() == image.numel() > 2**24


def test_bfloat16_convolution_of_one_pixel():
    """torch's own leaves garbage in the weight's gradient on some CPUs."""
    conv = Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
    x = torch.randint(0, 2, (3, 2, 16, 1, 1), generator=torch.Generator().manual_seed(0)).float()
    gradients = []
    for precision in ("fp32", "bf16", "bf16", "bf16"):
        conv.zero_grad()
        with autocast(x.device, precision):
            y = conv(with_packed(x.clone().requires_grad_(), pack(x)))
        y.float().square().sum().backward()
        gradients.append(conv.weight.grad.clone())
    assert y.dtype == torch.bfloat16
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=0.05, atol=0.05)


def test_gradient_of_a_gradient_is_refused():
    model = timm.create_model("spiking_convnet", channels=(4, 8), input_size=8, timesteps=2)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
