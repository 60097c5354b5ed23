"""Normalisation and neurons in C++, on a CPU: kernels/norm.cpp and kernels/neuron.cpp.

build.py compiles a library once for each kind of neuron; neither T nor shapes, types and layers are
a reason to compile again.
"""

import ctypes
import functools
from ctypes import POINTER, byref, c_double, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.build import load_library
from tetdist.nn.fast.dynamics import Dynamics, dynamics_of
from tetdist.nn.fast.fused import Affine, Inputs, Sums
from tetdist.nn.fast.native_library import CHANNELS, TYPES, Library, as_wide, at, threads, wide_type
from tetdist.nn.neurons import SURROGATES, NeuronConfig


class _Neuron(ctypes.Structure):
    """Neuron of kernels/neuron.cpp."""

    _fields_ = (
        *((name, c_double) for name in ("decay", "threshold", "width")),
        *((name, c_double) for name in ("share", "most", "levels")),
        ("weights", c_void_p),
    )


_SIZES = tuple((name, c_int64) for name in ("timesteps", "rows", "channels", "shared"))


class _Forward(ctypes.Structure):
    """Forward of kernels/neuron.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "shortcut", "gain", "offset")),
        *((name, c_void_p) for name in ("shortcut_gain", "shortcut_offset", "start", "identity")),
        *((name, c_void_p) for name in ("spikes", "packed", "end")),
        *_SIZES,
        ("neuron", _Neuron),
    )


class _Backward(ctypes.Structure):
    """Backward of kernels/neuron.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "shortcut", "gain", "offset", "mean", "rstd")),
        *((f"shortcut_{name}", c_void_p) for name in ("gain", "offset", "mean", "rstd")),
        *((name, c_void_p) for name in ("start", "grad_spikes", "grad_end", "total", "own")),
        *((name, c_void_p) for name in ("sum_grad", "sum_grad_xhat", "sum_grad_shortcut_hat")),
        *((name, c_void_p) for name in ("grad_start", "partial", "sum_share", "partial_share")),
        *_SIZES,
        ("neuron", _Neuron),
    )


class _Add(ctypes.Structure):
    """Add of kernels/norm.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "shortcut", "gain", "offset", "mean", "rstd")),
        *((f"shortcut_{name}", c_void_p) for name in ("gain", "offset", "mean", "rstd")),
        *((name, c_void_p) for name in ("out", "grad")),
        *((name, c_void_p) for name in ("sum_grad", "sum_grad_xhat", "sum_grad_shortcut_hat")),
        *(("partial", c_void_p), ("rows", c_int64), ("channels", c_int64), ("period", c_int64)),
    )


_NONE = (None,) * 4  # instead of an `Affine`


class NormKernels(Library):
    """The functions of kernels/norm.cpp. All tensors are without gaps, (T, N, C)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        signatures: dict[str, tuple[Any, ...]] = {
            "statistics": (c_void_p, c_int64, c_int64, *[c_void_p] * 3, c_int),
            "add": (POINTER(_Add), c_int),
            "add_sums": (POINTER(_Add), c_int),
            "input_gradient": (*[c_void_p] * 8, c_int64, c_int64, c_int),
        }
        super().__init__(library, signatures)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels, rows = x.shape[-1], x.shape[0] * x.shape[1]
        mean, var = torch.empty(2, channels, dtype=wide_type(x))
        partial = self.partial(2, rows, x)
        function = self.function("statistics", TYPES[x.dtype])
        function(*map(at, (x,)), rows, channels, *map(at, (mean, var, partial)), threads())
        return mean, var

    def add(
        self, x: Tensor, shortcut: Tensor | None, affine: Affine, of_shortcut: Affine | None
    ) -> Tensor:
        out = torch.empty_like(x)
        self._add("add", x, shortcut, affine, of_shortcut, out, *(None,) * 5)
        return out

    def add_sums(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        grad: Tensor,
    ) -> Sums:
        channels, wide = x.shape[-1], wide_type(x)
        sum_grad, sum_grad_xhat = torch.empty(2, channels, dtype=wide)
        sum_shortcut = None if of_shortcut is None else torch.empty(channels, dtype=wide)
        partial = self.partial(3, x.shape[0] * x.shape[1], x)
        sums = (sum_grad, sum_grad_xhat, sum_shortcut)
        self._add("add_sums", x, shortcut, affine, of_shortcut, None, grad, *sums, partial)
        return Sums(*sums)

    def _add(
        self,
        function: str,
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        *results: Tensor | None,
    ) -> None:
        norms = [as_wide(t, x) for one in (affine, of_shortcut) for t in one or _NONE]
        period = 1 if shortcut is None else shortcut.shape[0] * shortcut.shape[1]
        sizes = (x.shape[0] * x.shape[1], x.shape[2], period)
        job = _Add(*map(at, (x, shortcut, *norms, *results)), *sizes)
        self.function(function, TYPES[x.dtype])(byref(job), threads())

    def input_gradient(
        self,
        x: Tensor,
        grad_y: Tensor,
        affine: Affine,
        sum_grad: Tensor,
        sum_grad_xhat: Tensor,
        *,
        in_place: bool,
    ) -> Tensor:
        rows, channels = x.shape[0] * x.shape[1], x.shape[2]
        grad_x = grad_y if in_place else torch.empty_like(grad_y)
        gain, _, mean, rstd = affine
        wide = [as_wide(t, x) for t in (gain, mean, rstd, sum_grad, sum_grad_xhat)]
        function = self.function("input_gradient", TYPES[x.dtype])
        function(*map(at, (x, grad_y, *wide, grad_x)), rows, channels, threads())
        return grad_x


class Kernels(Library):
    """The functions of the library of one neuron. All tensors are without gaps."""

    def __init__(self, library: ctypes.CDLL, norms: NormKernels, dynamics: Dynamics) -> None:
        signatures: dict[str, tuple[Any, ...]] = {
            "forward": (POINTER(_Forward), c_int),
            "backward": (POINTER(_Backward), c_int),
        }
        super().__init__(library, signatures)
        self.norms, self.dynamics = norms, dynamics

    def _neuron(self, learned: Tensor | None) -> _Neuron:
        """The numbers of the neuron; it refers to those that are learnt, flat in float64."""
        of = self.dynamics
        decay, share = of.decay, 1 - of.decay
        if of.learns_decay:
            assert learned is not None
            share = learned.item()
            decay = 1 - share
        numbers = (decay, of.threshold, of.width, share, of.most or 0, of.levels)
        return _Neuron(*numbers, at(learned) if of.parallel else None)

    def spikes(
        self,
        inputs: Inputs,
        identity: Tensor | None,
        *,
        timesteps: int,
        packs: bool,
        carries: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, shortcut, affine, of_shortcut, start, _ = inputs
        shape = (timesteps, *x.shape[1:])
        norms = [as_wide(t, x) for one in (affine, of_shortcut) for t in (one or _NONE)[:2]]
        start = as_wide(start, x)
        spikes = torch.empty(shape, dtype=x.dtype)
        packed = torch.empty(shape, dtype=torch.uint8) if packs else None
        end = torch.empty(shape[1:], dtype=wide_type(x)) if carries else None
        pointers = map(at, (x, shortcut, *norms, start, identity, spikes, packed, end))
        flat = _flat(inputs.learned)
        job = _Forward(*pointers, *shape, x.shape[0] == 1, self._neuron(flat))
        self.function("forward", TYPES[x.dtype])(byref(job), threads())
        return spikes, packed, end

    def current_gradient(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Sums, "_Gradients"]:
        x, shortcut, affine, of_shortcut, start, learned = inputs
        timesteps, rows, channels = grad_spikes.shape
        shared = x.shape[0] == 1
        wide = wide_type(x)
        norms = [as_wide(t, x) for one in (affine, of_shortcut) for t in one or _NONE]
        start, grad_end = as_wide(start, x), as_wide(grad_end, x)
        # Where all timesteps share x, theirs is the sum; each one's own is the shortcut's alone.
        total = torch.empty_like(grad_spikes) if shortcut is not None or not shared else None
        own = torch.empty_like(x) if shared else None
        sum_grad, sum_grad_xhat = torch.empty(2, channels, dtype=wide)
        sum_shortcut = None if of_shortcut is None else torch.empty(channels, dtype=wide)
        grad_start = None if start is None else torch.empty_like(start)
        partial = None if affine is None else self.partial(3, rows, x)
        flat, grad_flat, partial_learned = _flat(learned), None, None
        if flat is not None:
            grad_flat = torch.empty_like(flat)
            parts = -(-rows * channels // CHANNELS)
            if affine is not None:
                parts = self.library.num_blocks(rows, channels)
            partial_learned = torch.empty(parts, len(flat), dtype=torch.float64)
        pointers = map(
            at,
            (
                x,
                shortcut,
                *norms,
                start,
                grad_spikes,
                grad_end,
                total,
                own,
                sum_grad,
                sum_grad_xhat,
                sum_shortcut,
                grad_start,
                partial,
                grad_flat,
                partial_learned,
            ),
        )
        neuron = self._neuron(flat)
        job = _Backward(*pointers, timesteps, rows, channels, shared, neuron)
        self.function("backward", TYPES[x.dtype])(byref(job), threads())
        grad_y = own if own is not None else total
        assert grad_y is not None
        grad_learned: list[Tensor] = []
        if grad_flat is not None:
            parts_of_it = grad_flat.to(wide).split([one.numel() for one in learned])
            grad_learned = [a.view_as(b) for a, b in zip(parts_of_it, learned, strict=True)]
        sums = Sums(sum_grad, sum_grad_xhat, sum_shortcut, tuple(grad_learned))
        return sums, _Gradients(total, grad_y, grad_start)


class _Gradients(NamedTuple):
    """Gradients of the current, (T, N, C), or None where nobody needs it at each timestep; of x as
    it was normalised, which is its sum over time where all timesteps share x; of the start."""

    total: Tensor | None
    of_normalized: Tensor
    start: Tensor | None


class NormPasses:
    """The passes of fused.py without neurons."""

    def __init__(self, norms: NormKernels, timesteps: int) -> None:
        self.norms, self.timesteps = norms, timesteps

    def normalization(self, norm: BatchNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Affine:
        mean, var = norm.running_mean, norm.running_var
        if norm.training:
            mean, var = norm.over_processes(*self.norms.statistics(x))
            # Where one x serves all timesteps, mean and variance are those of its T copies, too.
            norm.record(mean, var, self.timesteps * x.shape[1])
        rstd = torch.rsqrt(var + norm.eps)
        gain = norm.scale * weight * rstd
        return Affine(gain, bias - gain * mean, mean, rstd)

    def add(
        self, x: Tensor, shortcut: Tensor | None, affine: Affine, of_shortcut: Affine | None
    ) -> Tensor:
        return self.norms.add(x, shortcut, affine, of_shortcut)

    def add_sums(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        grad: Tensor,
    ) -> Sums:
        return self.norms.add_sums(x, shortcut, affine, of_shortcut, grad)

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
        return self.norms.input_gradient(x, grad, affine, *sums, in_place=in_place)


class Passes(NormPasses):
    """The passes of fused.py, for a neuron, T, and what the spikes come with."""

    def __init__(self, kernels: Kernels, timesteps: int, *, carries: bool, packs: bool) -> None:
        super().__init__(kernels.norms, timesteps)
        self.kernels, self.carries, self.packs = kernels, carries, packs

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.kernels.spikes(
            inputs, identity, timesteps=self.timesteps, packs=self.packs, carries=self.carries
        )

    def sums(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Sums, _Gradients]:
        # On a CPU the gradient of the current is worth writing down: to compute it again would take
        # longer than to read it.
        return self.kernels.current_gradient(inputs, grad_spikes, grad_end)

    def current_gradient(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        sums, gradients = self.kernels.current_gradient(inputs, grad_spikes, grad_end)
        return gradients.of_normalized, gradients.start, sums.grad_learned

    def gradients(
        self,
        inputs: Inputs,
        grad_spikes: Tensor,
        grad_end: Tensor | None,
        kept: _Gradients,
        of_x: tuple[Tensor, Tensor] | None,
        of_shortcut: tuple[Tensor, Tensor] | None,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        del grad_spikes, grad_end
        assert inputs.affine is not None

        grad_shortcut = None
        if inputs.shortcut is not None:
            assert kept.total is not None
            grad_shortcut = kept.total
            if inputs.of_shortcut is not None:
                grad_shortcut = self.norm_gradient(
                    inputs.shortcut, kept.total, inputs.of_shortcut, of_shortcut
                )
        grad_x = None
        if needs_x:
            # Written over the other, unless that is the shortcut's gradient, too.
            in_place = grad_shortcut is not kept.of_normalized
            grad_x = self.norm_gradient(
                inputs.x, kept.of_normalized, inputs.affine, of_x, in_place=in_place
            )
        return grad_x, grad_shortcut, kept.start


def _flat(learned: tuple[Tensor, ...]) -> Tensor | None:
    """All that neurons learn, one after the other, float64; None: nothing."""
    return torch.cat([one.double().flatten() for one in learned]) if learned else None


# --- building -----------------------------------------------------------------------------------


@functools.cache
def kernels(config: NeuronConfig) -> Kernels | None:
    """Return the neuron's compiled kernels, building them on first use; None without a compiler."""
    of, norms = dynamics_of(config), norm_kernels()
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
    return None if library is None or norms is None else Kernels(library, norms, of)


@functools.cache
def norm_kernels() -> NormKernels | None:
    """Normalisation, compiled if it never was on this machine; None without a compiler."""
    library = load_library("norm")
    return None if library is None else NormKernels(library)
