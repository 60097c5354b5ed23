"""Normalisation and neurons in C++, on a CPU: kernels/norm.cpp and kernels/neuron.cpp.

build.py compiles a library once per kind of neuron, for any T, shapes, types and layers.
"""

import ctypes
import functools
from ctypes import POINTER, byref, c_double, c_int, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.build import load_library
from tetdist.nn.fast.dynamics import dynamics_of
from tetdist.nn.fast.fused import (
    NO_AFFINE,
    Affine,
    Averages,
    Inputs,
    OutputGradients,
    Sums,
    split_learned,
)
from tetdist.nn.fast.native_library import CHANNELS, Library, as_wide, at, fields
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.precision import wide_type
from tetdist.nn.surrogates import SURROGATES


class _Neuron(ctypes.Structure):
    """Neuron of kernels/neuron.cpp."""

    _fields_ = (
        *fields("decay threshold width share most levels", c_double),
        ("weights", c_void_p),
        ("past", c_int64),
    )


_NORM = "gain offset mean rstd"
_OF_SHORTCUT = "shortcut_gain shortcut_offset shortcut_mean shortcut_rstd"
_SUMS = "sum_grad sum_grad_xhat sum_grad_shortcut_hat"
_SIZES = (*fields("timesteps rows channels shared", c_int64), ("neuron", _Neuron))


class _Forward(ctypes.Structure):
    """Forward of kernels/neuron.cpp."""

    _fields_ = (
        *fields("x shortcut gain offset shortcut_gain shortcut_offset", c_void_p),
        *fields("start identity spikes packed end", c_void_p),
        *_SIZES,
    )


class _Backward(ctypes.Structure):
    """Backward of kernels/neuron.cpp."""

    _fields_ = (
        *fields(f"x shortcut {_NORM} {_OF_SHORTCUT}", c_void_p),
        *fields(f"start grad_spikes grad_end total own {_SUMS}", c_void_p),
        *fields("grad_start partial sum_share partial_share", c_void_p),
        *_SIZES,
    )


class _Add(ctypes.Structure):
    """Add of kernels/norm.cpp."""

    _fields_ = (
        *fields(f"x shortcut {_NORM} {_OF_SHORTCUT} out grad {_SUMS} partial", c_void_p),
        *fields("rows channels period", c_int64),
    )


class NormKernels:
    """The kernels of fused.py without neurons: kernels/norm.cpp."""

    def __init__(self, timesteps: int) -> None:
        library = norm_library()
        assert library is not None
        self.norms, self.timesteps = library, timesteps

    def normalization(self, norm: BatchNorm, x: Tensor) -> Affine:
        mean, var = norm.running_mean, norm.running_var
        if norm.training:
            mean, var = norm.over_processes(*self.statistics(x))
            # If all timesteps share x, mean and variance equal those of its T copies.
            norm.record(mean, var, self.timesteps * x.shape[1])
        rstd = torch.rsqrt(var + norm.eps)
        gain = norm.scale * norm.weight * rstd
        return Affine(gain, norm.bias - gain * mean, mean, rstd)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each channel."""
        channels, rows = x.shape[-1], x.shape[0] * x.shape[1]
        mean, var = torch.empty(2, channels, dtype=wide_type(x))
        partial = self.norms.partial(2, rows, x)
        sizes, results = (rows, channels), map(at, (mean, var, partial))
        self.norms.function("statistics", x.dtype)(at(x), *sizes, *results, torch.get_num_threads())
        return mean, var

    def add(self, inputs: Inputs) -> Tensor:
        out = torch.empty_like(inputs.x)
        self._add("add", inputs, out, *(None,) * 5)
        return out

    def add_sums(self, inputs: Inputs, grad: Tensor) -> Sums:
        x, sums = inputs.x, _empty_sums(inputs)
        partial = self.norms.partial(3, x.shape[0] * x.shape[1], x)
        results = (sums.grad, sums.grad_xhat, sums.grad_shortcut_hat, partial)
        self._add("add_sums", inputs, None, grad, *results)
        return sums

    def _add(self, function: str, inputs: Inputs, *results: Tensor | None) -> None:
        x, shortcut = inputs.x, inputs.shortcut
        norms = [as_wide(t, x) for t in _affines(inputs)]
        period = 1 if shortcut is None else shortcut.shape[0] * shortcut.shape[1]
        sizes = (x.shape[0] * x.shape[1], x.shape[2], period)
        job = _Add(*map(at, (x, shortcut, *norms, *results)), *sizes)
        self.norms.function(function, x.dtype)(byref(job), torch.get_num_threads())

    def norm_gradient(
        self,
        x: Tensor,
        grad: Tensor,
        affine: Affine,
        sums: tuple[Tensor, Tensor] | None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        if sums is None:
            return (grad * affine.gain).to(x.dtype)
        rows, channels = x.shape[0] * x.shape[1], x.shape[2]
        grad_x = grad if in_place else torch.empty_like(grad)
        gain, _, mean, rstd = affine
        wide = [as_wide(t, x) for t in (gain, mean, rstd, *sums)]
        function = self.norms.function("input_gradient", x.dtype)
        function(*map(at, (x, grad, *wide, grad_x)), rows, channels, torch.get_num_threads())
        return grad_x


def _affines(inputs: Inputs, numbers: int = 4) -> list[Tensor | None]:
    """Return the first numbers of both normalisations: gain, offset, mean, 1/std."""
    pair = (inputs.affine or NO_AFFINE, inputs.of_shortcut or NO_AFFINE)
    return [number for affine in pair for number in affine[:numbers]]


def _empty_sums(inputs: Inputs) -> Sums:
    x = inputs.x
    grad, grad_xhat, of_others = torch.empty(3, x.shape[-1], dtype=wide_type(x))
    return Sums(grad, grad_xhat, None if inputs.of_shortcut is None else of_others)


class _Gradients(NamedTuple):
    """Gradients of the current, (T, N, C), or None if not needed per timestep; of the normalised x,
    which is the sum over time if all timesteps share x; of the start."""

    total: Tensor | None
    of_normalized: Tensor
    start: Tensor | None


class NeuronKernels(NormKernels):
    """The kernels of fused.py for one variant: kernels/neuron.cpp."""

    def __init__(self, config: NeuronConfig, timesteps: int, *, carries: bool, packs: bool) -> None:
        super().__init__(timesteps)
        library = neuron_library(config)
        assert library is not None
        self.library, self.dynamics = library, dynamics_of(config)
        self.carries, self.packs = carries, packs

    def _neuron(self, learned: Tensor | None) -> _Neuron:
        """Return the neuron's parameters; it refers to the learnt values, flat in float64."""
        of = self.dynamics
        decay, share = of.decay, 1 - of.decay
        if of.learns_decay:
            assert learned is not None
            share = learned.item()
            decay = 1 - share
        numbers = (decay, of.threshold, of.width, share, of.most or 0, of.levels)
        return _Neuron(*numbers, at(learned) if of.parallel else None, of.past)

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, shortcut, _, _, start, learned = inputs
        shape = (self.timesteps, *x.shape[1:])
        norms = [as_wide(t, x) for t in _affines(inputs, 2)]
        start = as_wide(start, x)
        spikes = torch.empty(shape, dtype=x.dtype)
        packed = torch.empty(shape, dtype=torch.uint8) if self.packs else None
        end = None
        if self.carries:
            end = torch.empty(self.dynamics.carried, *shape[1:], dtype=wide_type(x))
        pointers = map(at, (x, shortcut, *norms, start, identity, spikes, packed, end))
        flat = _flat(learned)
        job = _Forward(*pointers, *shape, x.shape[0] == 1, self._neuron(flat))
        self.library.function("forward", x.dtype)(byref(job), torch.get_num_threads())
        return spikes, packed, end

    def sums(self, inputs: Inputs, grads: OutputGradients) -> tuple[Sums, _Gradients]:
        # On a CPU storing the current's gradient pays: recomputing takes longer than reading.
        x, shortcut, affine, _, start, learned = inputs
        timesteps, rows, channels = grads.spikes.shape
        shared = x.shape[0] == 1
        norms = [as_wide(t, x) for t in _affines(inputs)]
        start, grad_end = as_wide(start, x), as_wide(grads.end, x)
        # If all timesteps share x, its gradient is the sum; only the shortcut needs each one.
        total = torch.empty_like(grads.spikes) if shortcut is not None or not shared else None
        own = torch.empty_like(x) if shared else None
        sums = _empty_sums(inputs)
        grad_start = None if start is None else torch.empty_like(start)
        partial = None if affine is None else self.library.partial(3, rows, x)
        flat, grad_flat, partial_learned = _flat(learned), None, None
        if flat is not None:
            grad_flat = torch.empty_like(flat)
            parts = -(-rows * channels // CHANNELS)
            if affine is not None:
                parts = self.library.num_blocks(rows, channels)
            partial_learned = torch.empty(parts, len(flat), dtype=torch.float64)
        tensors = (
            *(x, shortcut, *norms, start, grads.spikes, grad_end),
            *(total, own, sums.grad, sums.grad_xhat, sums.grad_shortcut_hat),
            *(grad_start, partial, grad_flat, partial_learned),
        )
        sizes = (timesteps, rows, channels, shared)
        job = _Backward(*map(at, tensors), *sizes, self._neuron(flat))
        self.library.function("backward", x.dtype)(byref(job), torch.get_num_threads())
        grad_y = own if own is not None else total
        assert grad_y is not None
        if grad_flat is not None:
            grad_learned = split_learned(grad_flat.to(wide_type(x)), learned)
            sums = sums._replace(grad_learned=grad_learned)
        return sums, _Gradients(total, grad_y, grad_start)

    def current_gradient(
        self, inputs: Inputs, grads: OutputGradients
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        sums, gradients = self.sums(inputs, grads)
        return gradients.of_normalized, gradients.start, sums.grad_learned

    def gradients(
        self,
        inputs: Inputs,
        grads: OutputGradients,
        kept: _Gradients,
        averages: Averages,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        del grads
        assert inputs.affine is not None
        grad_shortcut = kept.total if inputs.shortcut is not None else None
        if inputs.shortcut is not None and inputs.of_shortcut is not None:
            assert kept.total is not None
            grad_shortcut = self.norm_gradient(
                inputs.shortcut, kept.total, inputs.of_shortcut, averages.of_shortcut
            )
        grad_x = None
        if needs_x:
            # Overwrite the other, unless it is also the shortcut's gradient.
            in_place = grad_shortcut is not kept.of_normalized
            grad_x = self.norm_gradient(
                inputs.x, kept.of_normalized, inputs.affine, averages.of_x, in_place=in_place
            )
        return grad_x, grad_shortcut, kept.start


def _flat(learned: tuple[Tensor, ...]) -> Tensor | None:
    """Return all learnt values of the neurons, flat in float64; None if there are none."""
    return torch.cat([value.double().flatten() for value in learned]) if learned else None


# --- building -----------------------------------------------------------------------------------


@functools.cache
def neuron_library(config: NeuronConfig) -> Library | None:
    """Return the neuron's compiled kernels, building them on first use; None without a compiler."""
    of = dynamics_of(config)
    library = load_library(
        "neuron",
        f"-DSURROGATE={list(SURROGATES).index(of.surrogate)}",
        f"-DHARD_RESET={int(of.resets_to_zero)}",
        f"-DDETACH_RESET={int(of.detach_reset)}",
        f"-DFIRES_AT_THRESHOLD={int(of.fires_at_threshold)}",
        f"-DCOUNTS={int(of.most is not None)}",
        f"-DLEARNS_DECAY={int(of.learns_decay)}",
        f"-DSCALES_INPUT={int(of.scales_input)}",
        f"-DPARALLEL={int(of.parallel)}",
    )
    signatures = {"forward": (POINTER(_Forward), c_int), "backward": (POINTER(_Backward), c_int)}
    return None if library is None else Library(library, signatures)


@functools.cache
def norm_library() -> Library | None:
    """Return the compiled kernels of norms, built on first use; None without a compiler."""
    library = load_library("norm")
    signatures = {
        "statistics": (c_void_p, c_int64, c_int64, *[c_void_p] * 3, c_int),
        "add": (POINTER(_Add), c_int),
        "add_sums": (POINTER(_Add), c_int),
        "input_gradient": (*[c_void_p] * 8, c_int64, c_int64, c_int),
    }
    return None if library is None else Library(library, signatures)
