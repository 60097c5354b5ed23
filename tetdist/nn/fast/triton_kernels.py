"""Calls of the Triton kernels (kernels/*.py), which run on a GPU.

Triton compiles a kernel for each kind of neuron, T, type and set of present tensors, in seconds,
and caches it; shapes and layers need no recompilation. The division of work depends only on shapes,
and no sum depends on what ran before: results are bitwise identical on all GPUs of a model, also
after resuming.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from tetdist.nn import batch_norm
from tetdist.nn.batch_norm import BatchNorm
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
from tetdist.nn.fast.kernels import attention, neuron, packing
from tetdist.nn.fast.kernels import pool as pooling
from tetdist.nn.fast.pooling import Pooled, Pooling, Sizes, rows_of_images
from tetdist.nn.neurons import LIF, NeuronConfig
from tetdist.nn.precision import wide_type
from tetdist.storage.files import is_ours_alone, make_private

Argument = Tensor | int | None
# The oldest Triton, by family: 3.2 lacks tuples in kernels, and 3.3 cannot compile the products of
# attention for an H100 (make test-triton).
OLDEST = {"neurons": (3, 3), "pooling": (3, 3), "attention": (3, 4)}
WARPS = 4
THREADS = 32 * WARPS
# Registers (of 255) for the numbers that a thread processes in the backward pass, at most;
# addresses and sums need the others. tests/nn/test_triton_code.py checks that nothing spills.
KEPT_REGISTERS = 128
# Sums of tiles that a program keeps at most: the gradients of weights over time.
KEPT_SUMS = 40
# Maximum number of programs per kernel: enough to keep a GPU of 132 or 108 processors busy to the
# end, and few enough that their partial sums are a percent of what is read.
PROGRAMS = {
    "statistics": 1024,
    "add": 4096,
    "add_sums": 2048,
    "norm_gradient": 4096,
    "fire": 4096,
    "backward_sums": 2048,
    "backward": 4096,
}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    known: Mapping[str, Any],
) -> None:
    """Launch a kernel; no other place does.

    Args:
        kernel: A function of kernels/*.py.
        arguments: Contiguous tensors, sizes, and None for absent tensors.
        known: Compile-time constants, and num_warps if it is not `WARPS`.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    with _on_device_of(tensors[0]):
        # Round products and sums one by one, as in C++ and torch.
        options = {"num_warps": WARPS, "enable_fp_fusion": False, **known}
        kernel[grid](*arguments, **options)


def _on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


class Tiling(NamedTuple):
    """Division of rows and channels among programs.

    Attributes:
        grid: Programs, (blocks of rows, blocks of channels).
        steps: Tiles that a program processes, one below the other.
        groups: Number of groups of VEC channels.
        sizes: Rows and channels of a tile, and VEC, the divisor of C that the compiler knows.
    """

    grid: tuple[int, int]
    steps: int
    groups: int
    sizes: dict[str, int]


def tiling(name: str, rows: int, channels: int, per_thread: int) -> Tiling:
    """Divide (rows, channels) among the programs of a kernel, depending only on these."""
    assert rows < 2**31  # kernels count them in 32 bits
    columns = min(64, triton.next_power_of_2(channels))
    if channels > 64 and 0 < channels % 64 <= 32:
        columns = 32
    tile = {"VEC": math.gcd(channels, 16), "BN": per_thread * THREADS // columns, "BC": columns}
    across = triton.cdiv(channels, columns)
    tiles = triton.cdiv(rows, tile["BN"])
    steps = triton.cdiv(tiles * across, PROGRAMS[name])
    return Tiling((triton.cdiv(tiles, steps), across), steps, channels // tile["VEC"], tile)


def _over_rows(name: str, x: Tensor) -> Tiling:
    """Divide the rows of all timesteps of x, (T, N, C), among the programs of a kernel."""
    return tiling(name, x.shape[0] * x.shape[1], x.shape[2], 2 * _per_load(x))


def _per_load(x: Tensor) -> int:
    """Return how many numbers a thread loads at once: 16 bytes."""
    return 16 // x.element_size()


def _adding(channels: int) -> tuple[int, dict[str, int]]:
    """Return the number of programs that add up partial sums, and their constants: few channels and
    many loads at once, since each program waits for the memory alone."""
    columns = min(8, triton.next_power_of_2(channels))
    return triton.cdiv(channels, columns), {
        "VEC": math.gcd(channels, 16),
        "BP": 4 * THREADS,
        "BC": columns,
    }


class NormKernels:
    """The kernels of fused.py without neurons."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def normalization(self, norm: BatchNorm, x: Tensor) -> Affine:
        channels, wide = x.shape[2], wide_type(x)
        affine = torch.empty(4, channels, dtype=wide, device=x.device)
        records = norm.training and not batch_norm.is_repetition()
        known = {"SCALE": norm.scale, "EPS": norm.eps, "RECORDS": records}
        made_of: list[Argument] = [norm.weight, norm.bias, affine]
        if records:
            # If all timesteps share x, mean and variance equal those of its T copies.
            values = self.timesteps * x.shape[1] * norm.num_processes
            made_of += [norm.pending_mean, norm.pending_var, values]
        else:
            made_of += [None, None, 1]
        if norm.training and norm.average is None:
            self._statistics(x, None, made_of, known)
        else:
            statistics: list[Argument] = [None, norm.running_mean, norm.running_var]
            if norm.training:
                assert norm.average is not None
                moments = torch.empty(2, channels, dtype=torch.float64, device=x.device)
                self._statistics(x, moments, made_of, known)
                statistics = [norm.average(moments), None, None]
            programs, sizes = _adding(channels)
            arguments = [*statistics, *made_of, channels // sizes["VEC"]]
            sizes = {name: sizes[name] for name in ("VEC", "BC")}
            launch(neuron.normalization, (programs,), arguments, known | sizes)
        if records:
            norm.recorded()
        return Affine(*affine.unbind())

    def _statistics(
        self, x: Tensor, moments: Tensor | None, made_of: list[Argument], known: dict[str, Any]
    ) -> None:
        rows, channels = x.shape[0] * x.shape[1], x.shape[2]
        grid, steps, groups, tile = tiling("statistics", rows, channels, 4 * _per_load(x))
        partial = _partial(x, grid[0], 3)
        launch(neuron.statistics, grid, [x, partial, rows, groups, steps], tile)
        programs, sizes = _adding(channels)
        arguments: list[Argument] = [partial, moments, *made_of]
        arguments += [rows, steps * tile["BN"], grid[0], groups]
        launch(neuron.finish_statistics, (1, programs), arguments, known | sizes)

    def add(self, inputs: Inputs) -> Tensor:
        out = torch.empty_like(inputs.x)
        affine, of_shortcut = inputs.affine or NO_AFFINE, inputs.of_shortcut or NO_AFFINE
        tensors = [*affine[:2], *of_shortcut[:2], out]
        self._add(neuron.add, inputs, tensors, _over_rows("add", inputs.x))
        return out

    def add_sums(self, inputs: Inputs, grad: Tensor) -> Sums:
        x, affine, of_shortcut = inputs.x, inputs.affine, inputs.of_shortcut
        assert affine is not None
        divided = _over_rows("add_sums", x)
        partial = _partial(x, divided.grid[0], 2 if of_shortcut is None else 3)
        mean_of_shortcut = None if of_shortcut is None else of_shortcut.mean
        tensors = [affine.mean, mean_of_shortcut, grad, partial]
        self._add(neuron.add_sums, inputs, tensors, divided)
        return _finish_sums(partial, affine, of_shortcut)

    def _add(
        self, kernel: Any, inputs: Inputs, tensors: list[Tensor | None], divided: Tiling
    ) -> None:
        x, shortcut = inputs.x, inputs.shortcut
        grid, steps, groups, tile = divided
        known = {"SHARED": shortcut is not None and shortcut.shape[0] < x.shape[0]}
        rows, period = x.shape[0] * x.shape[1], x.shape[1]
        launch(kernel, grid, [x, shortcut, *tensors, rows, period, groups, steps], tile | known)

    def norm_gradient(
        self, x: Tensor, grad: Tensor, affine: Affine, sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        grad_x, rows = torch.empty_like(x), x.shape[0] * x.shape[1]
        grid, steps, groups, tile = _over_rows("norm_gradient", x)
        gain, _, mean, rstd = affine
        arguments: list[Argument] = [x, grad, gain, mean, rstd, *(sums or [None] * 2), grad_x]
        launch(neuron.norm_gradient, grid, [*arguments, rows, groups, steps], tile)
        return grad_x


def _partial(x: Tensor, blocks: int, number: int) -> Tensor:
    """Allocate the programs' sums of rows, (blocks, number, C)."""
    return torch.empty(blocks, number, x.shape[-1], dtype=wide_type(x), device=x.device)


def _finish_sums(partial: Tensor, affine: Affine, of_shortcut: Affine | None) -> Sums:
    """Add partial sums up, (blocks, 2 or 3, C)."""
    sums, copy = _added(partial, affine.rstd, None if of_shortcut is None else of_shortcut.rstd)
    grad, grad_xhat, *others = sums
    return Sums(grad, grad_xhat, others[0] if others else None, copy=copy)


def _added(partial: Tensor, *rstds: Tensor | None) -> Tensor:
    """Add partial sums up, (blocks, number, C), by `neuron.finish_sums`; return them twice."""
    blocks, number, channels = partial.shape
    sums = torch.empty(2, number, channels, dtype=partial.dtype, device=partial.device)
    programs, sizes = _adding(channels)
    arguments: list[Argument] = [partial, *(rstds or (None, None)), sums]
    arguments += [blocks, channels // sizes["VEC"]]
    launch(neuron.finish_sums, (number, programs), arguments, sizes)
    return sums


class NeuronKernels(NormKernels):
    """The kernels of fused.py for one variant."""

    def __init__(self, config: NeuronConfig, timesteps: int, *, carries: bool, packs: bool) -> None:
        super().__init__(timesteps)
        of = dynamics_of(config)
        self.carries, self.packs, self.dynamics = carries, packs, of
        self.forward: dict[str, Any] = {
            "T": timesteps,
            "HARD": of.resets_to_zero,
            "DECAY": of.decay,
            "THRESHOLD": of.threshold,
            "AT_THRESHOLD": of.fires_at_threshold,
            "MOST": of.most,
            "LEVELS": of.levels,
            "SCALES_INPUT": of.scales_input,
        }
        self.backward = self.forward | {
            "DETACH": of.detach_reset,
            "SURROGATE": of.surrogate,
            "WIDTH": of.width,
        }

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, shortcut, affine, of_shortcut, start, learned = inputs
        rows, channels = x.shape[1:]
        spikes = x.new_empty(self.timesteps, rows, channels)
        packed = torch.empty_like(spikes, dtype=torch.uint8) if self.packs else None
        end = None
        if self.carries:
            end = x.new_empty(self.dynamics.carried, rows, channels, dtype=wide_type(x))
        per_thread = self._per_thread(inputs, backward=False)
        grid, steps, groups, tile = tiling("fire", rows, channels, per_thread)
        arguments: list[Argument] = [x, shortcut, identity, *(affine or NO_AFFINE)[:2]]
        arguments += (of_shortcut or NO_AFFINE)[:2]
        arguments += [start, *_learned(learned), spikes, packed, end, rows, groups, steps]
        launch(neuron.fire, grid, arguments, self.forward | tile | self._shapes(x))
        return spikes, packed, end

    def _addressed(self, x: Tensor) -> int:
        """Return how many numbers of a timestep a thread can process: as many as it loads at once,
        or fewer if rows are not multiples of that, since each load needs registers for its address.
        """
        return min(_per_load(x), math.gcd(x.shape[2], 16) * max(1, 8 // self.timesteps))

    def _per_thread(self, inputs: Inputs, *, backward: bool = True) -> int:
        """Return how many numbers of a timestep a thread processes: `_addressed`, or fewer, so that
        all kept values stay in registers."""
        x, shortcut, _, of_shortcut, start, learned = inputs
        of, wide = self.dynamics, wide_type(x).itemsize
        # Products over time need as many registers again; else computing a number needs some.
        most = 2 * KEPT_REGISTERS if of.parallel else 4 * KEPT_REGISTERS
        kept = 0 if of.parallel else 36 if of.surrogate == "sigmoid" else 24
        kept += 0 if of_shortcut is None else 5 * wide  # the channel's, and its gradient's
        if backward or of.parallel:
            kept += (of.past + self.timesteps) * wide
        if backward:
            kept += 0 if start is None else of.past * wide  # the gradients of earlier currents
            kept += x.shape[0] * x.element_size()
            kept += 0 if shortcut is None else self.timesteps * shortcut.element_size()
        if backward and learned:
            # Also the membranes after the resets, for the share's gradient; or the gradients of the
            # sums over time, half of them in place of currents.
            kept += self.timesteps * wide // (2 if of.parallel else 1)
        number = self._addressed(x)
        while number > 1 and number * kept > most:
            number //= 2
        return number

    def _shapes(self, x: Tensor) -> dict[str, int]:
        return {"SHARED": x.shape[0] == 1, "PAST": self.dynamics.past}

    @property
    def _rows(self) -> int:
        """Number of timesteps whose weights' gradients a program sums, in registers."""
        numbers = self.dynamics.past + self.timesteps + 1
        return triton.cdiv(self.timesteps, triton.cdiv(self.timesteps * numbers, KEPT_SUMS))

    def sums(self, inputs: Inputs, grads: OutputGradients) -> tuple[Sums, None]:
        assert inputs.affine is not None
        partial, grad_learned = self._partial_sums(inputs, grads)
        assert partial is not None
        sums = _finish_sums(partial, inputs.affine, inputs.of_shortcut)
        return sums._replace(grad_learned=grad_learned), None

    def _partial_sums(
        self, inputs: Inputs, grads: OutputGradients
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return the programs' sums for batch norm, if there is one, and the learnt values'
        gradients."""
        x, shortcut, affine, of_shortcut, start, learned = inputs
        rows, channels = x.shape[1:]
        per_thread = self._per_thread(inputs)
        grid, steps, groups, tile = tiling("backward_sums", rows, channels, per_thread)
        known = self.backward | tile | self._shapes(x) | {"ROWS": self._rows}
        known["LOCAL"] = min(per_thread, known["BC"])
        parts = triton.cdiv(self.timesteps, self._rows) if self.dynamics.parallel else 1
        partial = None
        if affine is not None:
            partial = _partial(x, parts * grid[0], 2 if of_shortcut is None else 3)
        partial_learned = _partial_learned(learned, grid)
        arguments: list[Argument] = [x, shortcut, *(affine or NO_AFFINE)[:3]]
        arguments += (of_shortcut or NO_AFFINE)[:3]
        arguments += [start, *_learned(learned), *grads, partial, partial_learned]
        launch(neuron.backward_sums, (*grid, parts), [*arguments, rows, groups, steps], known)
        return partial, _grad_learned(learned, partial_learned)

    def current_gradient(
        self, inputs: Inputs, grads: OutputGradients
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        rows, channels = inputs.x.shape[1:]
        partial = None
        if not self.dynamics.parallel:
            divided = tiling("backward", rows, channels, self._per_thread(inputs))
            partial = _partial_learned(inputs.learned, divided.grid)
        grad_x, _, grad_start = self.gradients(
            inputs, grads, None, Averages(), partial, needs_x=True
        )
        assert grad_x is not None
        if self.dynamics.parallel:
            _, grad_learned = self._partial_sums(inputs, grads)
        else:
            grad_learned = _grad_learned(inputs.learned, partial)
        return grad_x, grad_start, grad_learned

    def gradients(
        self,
        inputs: Inputs,
        grads: OutputGradients,
        kept: None,
        averages: Averages,
        partial_share: Tensor | None = None,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `fused.NeuronKernels`; also fill the sums for a learnt share, if given."""
        del kept
        x, shortcut, affine, of_shortcut, start, learned = inputs
        rows, channels = x.shape[1:]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_shortcut = None if shortcut is None else torch.empty_like(shortcut)
        grad_start = None if start is None else torch.empty_like(start)
        if grad_x is None and grad_shortcut is None and grad_start is None:
            return None, None, None
        grid, steps, groups, tile = tiling("backward", rows, channels, self._per_thread(inputs))
        arguments: list[Argument] = [x, shortcut, *(affine or NO_AFFINE)]
        arguments += [*(of_shortcut or NO_AFFINE), start, *_learned(learned), *grads]
        arguments += [number for pair in averages for number in pair or (None, None)]
        arguments += [grad_x, grad_shortcut, grad_start, partial_share, rows, groups, steps]
        launch(neuron.backward, grid, arguments, self.backward | tile | self._shapes(x))
        return grad_x, grad_shortcut, grad_start


def _learned(learned: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Return a learnt share, and weights and biases over time; None for those that are absent."""
    return (None, *learned) if len(learned) == 2 else (*(learned or (None,)), None, None)


def _partial_learned(learned: tuple[Tensor, ...], grid: tuple[int, int]) -> Tensor | None:
    """Allocate each program's sums of the learnt values' gradients, if there are such values."""
    numbers = sum(value.numel() for value in learned)
    return learned[0].new_empty(math.prod(grid), 1, numbers) if learned else None


def _grad_learned(learned: tuple[Tensor, ...], partial: Tensor | None) -> tuple[Tensor, ...]:
    return () if partial is None else split_learned(_added(partial)[0, 0], learned)


# --- attention ----------------------------------------------------------------------------------

# Numbers of k^T v in a head, and timesteps, that registers hold.
MOST_PRODUCTS, MOST_TIMESTEPS = 64 * 64, 8


class AttentionKernels(NeuronKernels):
    """The kernels of `LinearAttention` and the neurons behind it, for queries, keys and values."""

    def __init__(
        self, config: NeuronConfig, q: Tensor, v: Tensor, heads: int, scale: float, **options: bool
    ) -> None:
        super().__init__(config, len(q), **options)
        self.dtype, self.programs, levels = q.dtype, q.shape[1] * heads, self.forward["LEVELS"]
        self.positions = q.shape[3:].numel()
        self.sizes: list[Argument] = [heads, self.positions]
        self.known = {"DK": q.shape[2] // heads, "DV": v.shape[2] // heads, "LEVELS": levels}
        self.widths = [max(16, triton.next_power_of_2(self.known[key])) for key in ("DK", "DV")]
        self.factor = scale / levels**2
        # The sums k^T v, in integers, are at most this.
        self.highest = self.positions * (config.highest * levels) ** 2

    def serve(self) -> bool:
        """Return whether they compute this variant, with exact sums."""
        fits = math.prod(self.widths) <= MOST_PRODUCTS and self.timesteps <= MOST_TIMESTEPS
        # In the backward pass float16 must hold the sums, times the factor.
        is_exact = self.highest <= 2**22 and self.highest * self.factor < 2**15
        is_served = not self.dynamics.parallel and self.dtype in (torch.bfloat16, torch.float16)
        return fits and is_exact and is_served

    def _tiles(self, columns: int, summed: int) -> Tiling:
        """Divide positions, also those summed in k^T v, and channels."""
        positions = self.positions
        warps = 8 if positions > 64 else 4
        rows, columns, splits = 16 * warps, min(self.widths[1], columns), self.highest > 2**11
        blocks = triton.cdiv(positions, rows) * triton.cdiv(self.known["DV"], columns)
        known = self.known | {"D": self.widths[0], "BJ": columns, "BN": rows, "BM": summed}
        known |= {"FACTOR": self.factor / known["LEVELS"], "SPLITS": splits, "num_warps": warps}
        return Tiling((self.programs, blocks), 1, 1, known)

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        assert identity is None
        v = inputs.x[2]
        spikes = torch.empty_like(v, dtype=self.dtype)
        packed = torch.empty_like(v, dtype=torch.uint8) if self.packs else None
        end = torch.empty_like(v[:1], dtype=torch.float32) if self.carries else None
        grid, *_, known = self._tiles(32, 64)
        arguments: list[Argument] = [*inputs.x, inputs.start, _learned(inputs.learned)[0]]
        arguments += [spikes, packed, end, *self.sizes]
        launch(attention.attend, grid, arguments, self.forward | known)
        return spikes, packed, end

    def current_gradient(
        self, inputs: Inputs, grads: OutputGradients
    ) -> tuple[Any, Tensor | None, tuple[Tensor, ...]]:
        """Return the gradients of queries, keys and values, of the start and of learnt values."""
        start, learned = inputs.start, inputs.learned
        # As many membranes as registers hold; Triton 3.4 multiplies 16 columns at least.
        kept = triton.next_power_of_2(self.timesteps) * (1 if start is None and not learned else 2)
        grid, *_, known = self._tiles(max(16, 128 // kept), 32)
        partial_share = _partial_learned(learned, grid)
        grad_spikes = grads.spikes.to(self.dtype)
        grad = torch.empty_like(grad_spikes)
        grad_start = None if start is None else torch.empty_like(start)
        arguments: list[Argument] = [*inputs.x, start, _learned(learned)[0], grad_spikes]
        arguments += [grads.end, grad, grad_start, partial_share, *self.sizes]
        launch(attention.current_gradient, grid, arguments, self.backward | known)
        grads_x = [torch.empty_like(x, dtype=self.dtype) for x in inputs.x]
        known = self.known | {"D": self.widths[0], "DW": self.widths[1], "FACTOR": self.factor}
        known |= {"BN": 32, "num_warps": 8}
        arguments = [*inputs.x, grad, *grads_x, *self.sizes]
        launch(attention.gradients, (self.timesteps * self.programs,), arguments, known)
        return grads_x, grad_start, _grad_learned(learned, partial_share)


# --- pooling ------------------------------------------------------------------------------------


class Pool(Pooling):
    """Max-pooling in Triton."""

    no_norm = (None,) * 6

    def start(
        self, name: str, tensors: tuple[Tensor | None, ...], sizes: Sizes, levels: int | None
    ) -> None:
        rows, results = tensors[0], tensors[-1]
        assert rows is not None
        assert results is not None
        pixels = math.prod(results.shape[:3])
        assert max(pixels, math.prod(rows.shape[:3])) < 2**31
        columns = min(64, triton.next_power_of_2(sizes.channels))
        known = {"VEC": math.gcd(sizes.channels, 16), "BN": 8 * THREADS // columns, "BC": columns}
        grid = (triton.cdiv(pixels, known["BN"]), triton.cdiv(sizes.channels, columns))
        arguments: list[Argument] = [*tensors, pixels, sizes.channels // known["VEC"]]
        arguments += _sides(sizes)
        known |= _window(sizes) | ({} if levels is None else {"LEVELS": levels})
        launch(getattr(pooling, name), grid, arguments, known)

    def sums(self, kernels: Any, pooled: Pooled, grad: Tensor) -> tuple[Sums, Tensor]:
        del kernels
        x, affine, where, window = pooled
        sizes, grad = Sizes.of(x.shape, window), rows_of_images(grad)
        pixels = math.prod(where.shape[:3])
        grid, steps, groups, tile = tiling("add_sums", pixels, sizes.channels, 8)
        images = rows_of_images(x)
        partial = _partial(images, grid[0], 2)
        arguments: list[Argument] = [grad, where, images, affine.mean, partial, pixels]
        arguments += [steps, groups, *_sides(sizes)]
        launch(pooling.backward_sums, grid, arguments, tile | _window(sizes))
        return _finish_sums(partial, affine, None), grad

    def gradient(
        self, kernels: Any, pooled: Pooled, grad: Tensor, sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        del kernels
        x, (gain, _, mean, rstd), where, window = pooled
        images = rows_of_images(x)
        of_images = torch.empty_like(images)
        tensors = (grad, where, images, gain, mean, rstd, *(sums or (None, None)), of_images)
        self.start("backward", tensors, Sizes.of(x.shape, window), None)
        return of_images.permute(0, 3, 1, 2)


def _sides(sizes: Sizes) -> list[Argument]:
    return [sizes.height, sizes.width, sizes.out_height, sizes.out_width]


def _window(sizes: Sizes) -> dict[str, int]:
    return {"KERNEL": sizes.kernel, "STRIDE": sizes.stride, "PADDING": sizes.padding}


# --- spikes in bytes ----------------------------------------------------------------------------

BLOCK = 8 * THREADS


def unpack(values: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """Return bytes as numbers of ``dtype``, divided by ``levels``, in the same layout."""
    numbers = torch.empty_like(values, dtype=dtype)
    flat = _flat(values)
    grid, count, known = _flat_work(flat.numel(), BLOCK)
    launch(packing.unpack, grid, [flat, _flat(numbers), count], known | {"LEVELS": levels})
    return numbers


def halve(values: Tensor) -> Tensor:
    """Return bytes below 16 packed two in one, flat in memory order."""
    flat = _flat(values)
    halves = torch.empty(triton.cdiv(len(flat), 2), dtype=torch.uint8, device=values.device)
    grid, count, known = _flat_work(len(flat), 2 * BLOCK)
    launch(packing.halve, grid, [flat, halves, count], known)
    return halves


def unpack_halves(
    halves: Tensor, shape: torch.Size, strides: tuple[int, ...], levels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the halved bytes, and the same as numbers; see `unpack`."""
    values = torch.empty(math.prod(shape), dtype=torch.uint8, device=halves.device)
    numbers = torch.empty_like(values, dtype=dtype)
    grid, count, known = _flat_work(len(values), 2 * BLOCK)
    arguments: list[Argument] = [halves, values, numbers, count]
    launch(packing.unpack_halves, grid, arguments, known | {"LEVELS": levels})
    return values.as_strided(shape, strides), numbers.as_strided(shape, strides)


def _flat_work(count: int, of_program: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Return the programs, groups of numbers, and constants."""
    known = {"VEC": math.gcd(count, 16), "BLOCK": BLOCK}
    return (triton.cdiv(count, of_program),), count // known["VEC"], known


def _flat(x: Tensor) -> Tensor:
    """Return a dense tensor flat, in memory order."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def keep_kernels_here() -> None:
    """Have Triton keep compiled kernels on the host's own disk, unless the environment names a
    folder: the home folder, its default, is often on a slow shared disk."""
    folder = Path(tempfile.gettempdir()) / f"tetdist-{os.getuid()}"
    with contextlib.suppress(OSError):
        make_private(folder)
        # Another user could redirect a link to code of theirs; noexec disks cannot hold libraries.
        if is_ours_alone(folder.lstat()) and not os.statvfs(folder).f_flag & os.ST_NOEXEC:
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def check(family: str, device: torch.device) -> None:
    """Let Triton compile and run a kernel of a family (`dispatch.FAMILIES`), and check its result.

    Raises:
        Exception: Any type; Triton, the driver and the C compiler raise their own.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST[family]:
        oldest = ".".join(map(str, OLDEST[family]))
        raise RuntimeError(f"Triton {triton.__version__} is older than {oldest}")
    keep_kernels_here()
    if not _CHECKS[family](device):
        raise RuntimeError("a kernel returns wrong results")


def _check_neurons(device: torch.device) -> bool:
    values = torch.arange(200, dtype=torch.uint8, device=device)
    return torch.equal(unpack(values, 4, torch.float32).cpu(), values.cpu() / 4)


def _check_pooling(device: torch.device) -> bool:
    values = torch.arange(64, dtype=torch.uint8, device=device).view(1, 1, 8, 8)
    pooled, numbers, _ = Pool().forward(values, 1, torch.float32, nn.MaxPool2d(2))
    wanted = values.cpu()[..., 1::2, 1::2]
    return torch.equal(pooled.cpu(), wanted) and torch.equal(numbers.cpu(), wanted.float())


def _check_attention(device: torch.device) -> bool:
    """Let every position attend to the one that spikes, so that all fire in its channel."""
    spikes = torch.zeros(1, 1, 32, 1, 16, dtype=torch.bfloat16, device=device)
    kernels = AttentionKernels(LIF(), spikes, spikes, 1, 1.0, carries=False, packs=False)
    queries, values = (torch.zeros(1, 16, 32, dtype=torch.uint8, device=device) for _ in range(2))
    queries[:] = 1
    values[0, 5, 7] = 1
    inputs = Inputs((queries, queries, values), None, None, None, None, ())
    fired, _, _ = kernels.spikes(inputs, None)
    return fired.sum().item() == 16 and bool((fired[..., 7] == 1).all())


_CHECKS = {"neurons": _check_neurons, "pooling": _check_pooling, "attention": _check_attention}
