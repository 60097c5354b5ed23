"""How tests of the fused path and of the models run its kernels, and how they compare."""

import contextlib
import copy
import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from tetdist.losses import tet_loss
from tetdist.nn import batch_norm
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch, native, native_library
from tetdist.nn.neurons import LIF
from tetdist.nn.norm_neuron import FusedLayer
from tetdist.nn.precision import autocast


@contextlib.contextmanager
def not_native() -> Iterator[None]:
    """As if there were no kernels in C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "serves", lambda *_: False)
        yield


def needs_triton() -> None:
    """Skip the test, or the module that calls this, where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        tiny.skip("there is no Triton; make test installs it")


def needs_compiler(found: object) -> None:
    """Skip the test where a compiler or what it makes was not found."""
    if found is None:
        tiny.skip("no C++ compiler, or the kernels do not build with it")


# Attributes of triton_kernels, and the modules of kernels that they are.
MODULES = {"neuron": "neuron", "pooling": "pool", "packing": "packing", "attention": "attention"}


@contextlib.contextmanager
def interpreted(programs: int = 2) -> Iterator[None]:
    """The kernels of GPUs, interpreted: run on the CPU, by NumPy, one by one.

    There are at most two programs, so that each has several tiles where there are some. Memory that
    no program writes is NaN, or 255.
    """
    needs_triton()
    from triton.runtime.interpreter import InterpreterBuilder

    from tetdist.nn.fast import triton_kernels

    with not_native(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(dispatch, "triton_for", lambda *_: triton_kernels)
        patch.setattr(triton_kernels, "PROGRAMS", dict.fromkeys(triton_kernels.PROGRAMS, programs))
        for attribute, name in MODULES.items():
            patch.setattr(triton_kernels, attribute, _interpreted_kernels(name))
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def native_kernels() -> Iterator[None]:
    """The kernels of CPUs, and nothing else in their place."""
    needs_compiler(native.neuron_library(LIF()))
    with pytest.MonkeyPatch.context() as patch:
        # Should a neuron's own not build, this must not become a test of something else.
        patch.setattr(dispatch, "_warn_of_missing_library", None)
        yield


IMPLEMENTATIONS = {"native": native_kernels, "triton": interpreted}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def _dot(_self: object, a: Any, b: Any, total: Any, *_options: object) -> Any:
    """Multiply matrices as a GPU does; the interpreter takes the bits of bfloat16 for integers."""
    from triton.runtime import interpreter

    a, b = (
        torch.from_numpy(x.data).view(torch.bfloat16).float().numpy()
        if x.data.dtype == "uint16"
        else x.data.astype("float32")
        for x in (a, b)
    )
    return interpreter.TensorHandle(a @ b + total.data, total.dtype.scalar)


@functools.cache
def _interpreted_kernels(name: str) -> ModuleType:
    """A second copy of a module of kernels. Triton decides by a variable of the environment, at the
    moment of decoration, whether it will compile a kernel or interpret it."""
    import triton.language as tl

    spec = importlib.util.find_spec(f"tetdist.nn.fast.kernels.{name}")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    # By this name the interpreter knows a sum, and has NumPy make it; another it makes in Python.
    module._add = tl.standard._sum_combine
    if name != "neuron":
        module.neuron = _interpreted_kernels("neuron")
    return module


def assert_addresses_exist(launch: Any) -> None:
    """Interpret a kernel's first and last program on tensors without memory (a `gpu_code.Launch`).

    Each address that they use has to be in a tensor, and the last ones near the end of large ones.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    given, spans = [], []
    for one in launch.arguments:
        if isinstance(one, Tensor):
            first = (len(spans) + 1) << 40
            spans.append((first, first + one.nbytes))
            given.append(SimpleNamespace(data_ptr=lambda x=first: x, dtype=one.dtype))
        else:
            given.append(one)
    begins, ends = np.array(spans).T
    reached = begins.copy()

    def use(pointers: Any, mask: Any) -> None:
        used = pointers.data[mask.data].astype(np.int64)
        number = np.searchsorted(begins, used, side="right") - 1
        assert ((number >= 0) & (used < ends[number])).all(), launch.name
        np.maximum.at(reached, number, used)

    def load(_: Any, pointers: Any, mask: Any, *_options: object) -> Any:
        use(pointers, mask)
        kind = pointers.get_element_ty()
        # The middle of a pooling's window, where that is asked for.
        return TensorHandle(np.full(mask.data.shape, 4, interpreter._get_np_dtype(kind)), kind)

    name = launch.kernel.fn.__module__.rpartition(".")[2]
    kernel = getattr(_interpreted_kernels(name), launch.name)
    function, known = kernel.rewrite(), dict(launch.known)
    for name in known.keys() - {*kernel.arg_names}:
        del known[name]
    grid = (*launch.grid, 1, 1)[:3]
    scope = interpreter._patch_lang(function)
    # Only addresses count; what is computed from the made-up numbers may overflow.
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        patch.setattr(InterpreterBuilder, "create_masked_load", load)
        patch.setattr(
            InterpreterBuilder, "create_masked_store", lambda _, x, __, m, *___: use(x, m)
        )
        interpreter.interpreter_builder.set_grid_dim(*grid)
        try:
            arguments = [interpreter._implicit_cvt(one) for one in given]
            for place in ((0, 0, 0), [number - 1 for number in grid]):
                interpreter.interpreter_builder.set_grid_idx(*place)
                function(*arguments, **known)
        finally:
            scope.restore()
    is_large = ends - begins > 2**31
    assert (ends - reached < 2**20)[is_large].all(), launch.name


def draw(seed: int, *shape: int) -> Tensor:
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Weights, biases and running statistics of all norms that are neither 0 nor 1 nor equal."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, BatchNorm):
                norm.weight.copy_(uniform(norm.weight, 0.6, 1.6))
                norm.bias.copy_(uniform(norm.bias, 0.1, 0.5))
                norm.running_mean.copy_(uniform(norm.running_mean, -0.3, 0.3))
                norm.running_var.copy_(uniform(norm.running_var, 0.5, 1.5))


def results_of(
    module: nn.Module, call: Callable[[nn.Module], Tensor], inputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Output, all gradients and the running statistics of a copy of ``module`` after one call.

    The gradient is that of a weighted sum of the output with fixed random weights.
    """
    module = copy.deepcopy(module)
    for leaf in inputs.values():
        leaf.grad = None
    output = call(module)
    generator = torch.Generator().manual_seed(17)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (output * weight.to(output.dtype)).sum().backward()
    results = {"output": output.detach()}
    for name, tensor in [*inputs.items(), *module.named_parameters()]:
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            results[f"gradient of {name}"] = tensor.grad.detach()
    return results | dict(module.named_buffers())


def assert_same(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    rtol: float = 1e-9,
    *,
    equal_nan: bool = False,
) -> None:
    """Every named result within ``rtol`` of the largest value that its tensor has."""
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        scale = max(1.0, right.abs().max().item()) if right.numel() else 1.0
        torch.testing.assert_close(
            *(got[name], right),
            rtol=rtol,
            atol=rtol * scale,
            equal_nan=equal_nan,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def fused_and_defined(
    module: nn.Module,
    call: Callable[[nn.Module], Tensor],
    inputs: dict[str, Tensor],
    implementation: str = "native",
    rtol: float = 1e-9,
    *,
    equal_nan: bool = False,
) -> dict[str, Tensor]:
    """`results_of` a module's definition, which are those of its fused kernels."""
    results = []
    for execution in ("fused", "reference"):
        for layer in module.modules():
            if isinstance(layer, FusedLayer):
                layer.execution = execution
        with IMPLEMENTATIONS[implementation]():
            results.append(results_of(module, call, inputs))
    assert_same(*results, rtol=rtol, equal_nan=equal_nan)
    return results[1]


@contextlib.contextmanager
def kept_tensors() -> Iterator[list[Tensor]]:
    """The tensors that are kept for the backward pass, within this context."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


# One small network of each family and kind of block, with at least eight channels: with fewer, on
# processors with only AVX2, oneDNN writes past its memory in strided 1x1 convolutions' backward
# pass.
SMALL = {
    "sew_resnet18": {"width": 8},
    "sew_resnet50": {"width": 8, "connect_function": "iand"},
    "spiking_resnet18": {"width": 8, "stem_width": 8},
    "spiking_resnet19": {"width": 8, "stem_width": 8, "hidden_features": 8},
    "preact_resnet18": {"width": 8},
    "ms_resnet18": {"width": 8},
    "spiking_convnet": {"channels": (4, 8, 8), "input_size": 16},
    "vggsnn": {"input_size": 16},
    "qkformer_10_384": {
        "widths": (8, 8, 16),
        "depths": (1, 1, 1),
        "heads": 2,
        "mixes_samples": True,
    },
    "qkformer_4_384_cifar": {"widths": (8, 8, 16), "depths": (1, 1, 1), "heads": 2},
    "sdt_2_256_cifar": {"channels": 16, "depth": 1},
    "espikeformer_t": {"widths": (8, 8, 8, 16), "depths": (1, 1), "heads": 2},
    "ms_qkformer_4_384_cifar": {
        "widths": (8, 8, 16),
        "depths": (1, 1, 1),
        "heads": 2,
        "mlp_ratio": 1,
    },
}


def step(model: nn.Module, x: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
    """Loss, gradients and running statistics of one step of a network with three classes."""
    with autocast(x.device, precision):
        logits = model(x, per_timestep=True)
    loss = tet_loss(logits, torch.arange(len(x)) % 3, lambda_=0.1)
    loss.backward()
    batch_norm.update_running_statistics(model, lambda t: t)
    result = {name: p.grad for name, p in model.named_parameters()}
    return result | dict(model.named_buffers()) | {"loss": loss.detach()}
