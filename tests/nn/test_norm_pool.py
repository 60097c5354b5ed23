"""Batch norm before a pooling: the fast path against the definition."""

import pytest
import torch
from kernel_runs import (
    fused_and_defined,
    interpreted,
    kept_tensors,
    native_kernels,
    randomize,
)
from torch import nn

from tetdist.nn.fast import dispatch
from tetdist.nn.fast.fused import Affine
from tetdist.nn.norm_pool import NormPool

pytestmark = pytest.mark.usefixtures("one_thread")


def module_of(*, training, dtype=torch.float64):
    module = NormPool(5)
    randomize(module)
    with torch.no_grad():
        module.norm.weight[::2] *= -1  # the largest is that of the smallest current
    return module.to(dtype).train(training)


def current_of(timesteps=2, shape=(7, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(timesteps * 3, 5, *shape, generator=generator).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).unflatten(0, (timesteps, 3))
    return x.requires_grad_()


@pytest.mark.parametrize("implementation", ["native", "triton"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(7, 6), (1, 1), (8, 3)], ids=str)
def test_is_the_definition(shape, training, implementation):
    x, module = current_of(shape=shape), module_of(training=training)
    results = fused_and_defined(module, lambda m: m(x), {"current": x}, implementation)
    assert results["output"].shape == (2, 3, 5, (shape[0] + 1) // 2, (shape[1] + 1) // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_pass_of_gpus_is_that_of_cpus_bitwise(dtype):
    """Also with several equal maxima in a window, and with NaN."""
    x = (2 * current_of(dtype=dtype).detach().flatten(0, 1)).round()
    x[0, :, 0, 0], x[1, :, 2, 2] = -torch.inf, torch.nan
    gain = torch.linspace(-1, 2, 5, dtype=torch.promote_types(dtype, torch.float32))
    affine, window = Affine(gain, gain / 3, gain, gain), nn.MaxPool2d(3, 2, 1)
    found = []
    for context in (native_kernels(), interpreted()):
        with context:
            kernel = dispatch.pooling_for(x)
            pooled, where = kernel.forward_normalized(x, affine, window)
            found.append((pooled, where, kernel.backward(pooled, where, x.shape, window)))
    # Triton's interpreter cuts off what bfloat16 has no room for; its compiler rounds.
    rounding = 2**-6 if dtype == torch.bfloat16 else 0.0
    for ours, theirs in zip(*found, strict=True):
        within = rounding if ours.is_floating_point() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=within, atol=within, equal_nan=True)


def test_copies_count_for_the_running_variance():
    x, found = current_of(timesteps=1), []
    for given, copies in ((x, 1), (x, 4), (x.expand(4, -1, -1, -1, -1), 1)):
        module = module_of(training=True)
        results = fused_and_defined(
            module,
            lambda m, y=given, n=copies: m(y, copies=n),
            {"current": x},
        )
        found.append(results["norm.running_var"])
    once, counted, there = found
    torch.testing.assert_close(counted, there, rtol=1e-12, atol=0)
    assert not torch.allclose(once, there, rtol=1e-4)


def test_keeps_the_current_and_bytes():
    x = current_of(dtype=torch.float32)
    with kept_tensors() as kept:
        module_of(training=True, dtype=torch.float32)(x)
    large = [t for t in kept if t.numel() >= 2 * 3 * 5 * 4 * 3]
    assert sorted(t.dtype.itemsize for t in large) == [1, 4]
