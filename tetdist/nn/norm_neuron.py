"""Layers of neurons, alone or with normalisation, an added shortcut and added spikes.

The definitions are a few lines at the end of each `forward`; fused.py computes the same with one
pass over memory forward and one backward.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.dropout import DropPath
from tetdist.nn.fast import dispatch
from tetdist.nn.fast.fused import (
    FusedNeuron,
    FusedNormAdd,
    FusedNormNeuron,
    NeuronKernels,
    NormKernels,
    Norms,
)
from tetdist.nn.neurons import NeuronConfig
from tetdist.nn.packed import Packed, marked, packed_of, with_packed
from tetdist.nn.precision import wide_type


def spiking_layers(model: nn.Module) -> "dict[str, NeuronLayer]":
    """Return a model's neuron layers by name; none in a ReLU network."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NeuronLayer) and module.neuron.spiking
    }


def neurons_of(model: nn.Module) -> list[NeuronConfig]:
    """Return the neurons of a model's neuron layers; none in a ReLU network."""
    return [layer.neuron for layer in spiking_layers(model).values()]


def neuron_of(module: nn.Module) -> NeuronConfig | None:
    """Return a neuron layer's neuron; None for any other module."""
    return module.neuron if isinstance(module, NeuronLayer) else None


def is_causal(model: nn.Module) -> bool:
    """Return whether a model's logits at t are independent of T: one pass gives all smaller T."""
    looks_ahead = getattr(model, "looks_ahead", None)
    return not looks_ahead and all(neuron.causal for neuron in neurons_of(model))


def firing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return `spiking_layers` and other libraries' modules marked by ``fires_spikes``.

    They return spikes.
    """
    own = spiking_layers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name in own or getattr(module, "fires_spikes", False)
    }


class LatestLevels:
    """The outputs of a model's neurons while it runs.

    A layer of synapses sees spikes of the neurons before it. A network's neurons are alike, except
    E-SpikeFormer's before the classifier, which send integers.

    Attributes:
        levels: Outputs are multiples of ``1 / levels``; None: any numbers, or no neuron has run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.levels: int | None = None
        self._handles = []
        for module in model.modules():
            if (neuron := neuron_of(module)) is not None:
                self._handles.append(module.register_forward_hook(self._note(neuron.levels)))

    def _note(self, levels: int | None) -> Callable[..., None]:
        def note(*_: object) -> None:
            self.levels = levels

        return note

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class FusedLayer(nn.Module):
    """A layer with fused kernels; with ``execution="reference"`` it runs the definition."""

    def __init__(self) -> None:
        super().__init__()
        self.execution = "fused"

    def is_fused(self) -> bool:
        """Return whether to use fused kernels, if any; torch.export needs the definition.

        Raises:
            UserError: torch.jit.trace records the layer.
        """
        if torch.jit.is_tracing():
            raise UserError(
                f"torch.jit.trace cannot record {type(self).__name__}, which chooses its kernels "
                "when it runs; to export the network, use torch.export instead of torch.jit.trace"
            )
        match self.execution:
            case "fused":
                exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
                return exporting is None or not exporting()
            case "reference":
                return False
            case other:
                raise ValueError(f"execution must be 'fused' or 'reference', not {other!r}")


class _Membranes(threading.local):
    """Membranes by layer, of the layers within `carrying_membranes`; each thread has its own.

    Blocks, torch's containers and users' modules call a layer with one argument, so a membrane
    cannot be passed and returned as in torch's recurrent layers. It is kept here.
    """

    def __init__(self) -> None:
        self.of: dict[nn.Module, Tensor | None] = {}  # None: at rest


_membranes = _Membranes()


def learned_of(neuron: NeuronConfig, num_channels: int) -> nn.ParameterDict:
    """Make a neuron layer's own learnt parameters; optimisers do not decay them."""
    parameters = neuron.parameters(num_channels)
    for name, value in parameters.items():
        if name not in neuron.over_time and value.shape == (0,):
            kind = type(neuron).__name__
            raise ValueError(f"{kind} learns a value per channel; make it by Neuron(neuron, C)")
        if name not in neuron.over_time and value.shape not in ((), (num_channels,)):
            raise ValueError(
                f"the parameter {name} of {type(neuron).__name__} has the shape "
                f"{tuple(value.shape)}; it must be () or ({num_channels},), one per channel"
            )
    return nn.ParameterDict(parameters)


def broadcasting(
    neuron: NeuronConfig, parameters: nn.ParameterDict, sides: int
) -> dict[str, Tensor]:
    """Return a layer's parameters as `NeuronConfig.run` takes them.

    Args:
        sides: Number of the current's dimensions after the channels.
    """
    return {
        name: value if name in neuron.over_time else value.view(-1, *(1,) * sides)
        for name, value in parameters.items()
    }


class NeuronLayer(FusedLayer):
    """A layer of neurons, whose membranes `carrying_membranes` takes from segment to segment.

    Attributes:
        learned: The neurons' own learnt values; a subclass creates them after its norm.
    """

    learned: nn.ParameterDict

    def __init__(self, neuron: NeuronConfig) -> None:
        super().__init__()
        self.neuron = neuron

    @property
    def carries(self) -> bool:
        """True if the layer runs within `carrying_membranes`, in this thread."""
        return self in _membranes.of

    @property
    def membrane(self) -> Tensor | None:
        """The membrane after the segment before this one; None: at rest."""
        return _membranes.of.get(self)

    def fire(self, current: Tensor, timesteps: int) -> Tensor:
        """Return spikes (T, B, ...) of a current (1 or T, B, ...), in its type and layout."""
        if self.is_fused():
            kernels = dispatch.kernels_for(
                self.neuron,
                (current,),
                timesteps,
                carries=self.carries,
                packs=self.training and torch.is_grad_enabled(),
            )
            if kernels is not None:
                return self._fire_fused(current, kernels)
        return self.fire_by_definition(current, timesteps)

    def fire_by_definition(self, current: Tensor, timesteps: int) -> Tensor:
        """Compute `fire` by its definition."""
        learned = broadcasting(self.neuron, self.learned, 2 if current.ndim == 5 else 0)
        current = current.expand(timesteps, *current.shape[1:])
        spikes, membrane = self.neuron.run(current, self.membrane, **learned)
        if self.carries:
            _membranes.of[self] = membrane
        return spikes

    def _fire_fused(
        self, current: Tensor, kernels: NeuronKernels, attended: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """Run the kernels on the current, or on queries, keys and values.

        Spikes have the layout of the last of these tensors. If each of them has bytes, the backward
        pass keeps the bytes instead of the tensors.
        """
        tensors = (current, *attended)
        # Of an image that is attended to, channels are last.
        layouts = [_Layout.of(x, (1, 3, 4, 2) if attended else None) for x in tensors]
        flat = [layout.flat(x) for layout, x in zip(layouts, tensors, strict=True)]
        x, keys, values = flat if attended else (*flat, None, None)
        for_backward, layout = tuple(flat), layouts[-1]
        if attended and all(forms := [packed_of(x) for x in tensors]):
            pairs = zip(layouts, forms, strict=True)
            for_backward = tuple(own.flat(form.values) for own, form in pairs if form)
        start = None if (u := self.membrane) is None else layout.flat(self._stacked(u))
        spikes, packed, end = FusedNeuron.apply(
            x, keys, values, start, kernels, for_backward, *self.for_kernels(current, kernels)
        )
        if self.carries:
            _membranes.of[self] = self._unstacked(layout.shaped(end))
        spikes = layout.shaped(spikes)
        return self.with_bytes(spikes, None if packed is None else layout.shaped(packed))

    def _stacked(self, membrane: Tensor) -> Tensor:
        """Return a segment's first membrane as the kernels take it, (K, B, ...)."""
        return membrane if self.neuron.sample_axis else membrane[None]

    def _unstacked(self, end: Tensor) -> Tensor:
        return end if self.neuron.sample_axis else end.squeeze(0)

    def for_kernels(self, current: Tensor, kernels: NeuronKernels) -> tuple[Tensor, ...]:
        """Return the learnt values as the kernels take them, in their compute type."""
        wide = wide_type(current)
        parameters = {name: value.to(wide) for name, value in self.learned.items()}
        return self.neuron.for_kernels(kernels.timesteps, **parameters)

    def with_bytes(
        self, spikes: Tensor, packed: Tensor | None, *, are_sums: bool = False
    ) -> Tensor:
        """Attach their bytes, if any, to spikes or sums of them, and mark spikes of 0 and 1."""
        if self.neuron.levels == 1 and self.neuron.highest == 1 and not are_sums:
            spikes = marked(spikes)
        if packed is None:
            return spikes
        assert self.neuron.levels is not None
        return with_packed(spikes, Packed(packed, self.neuron.levels))

    def extra_repr(self) -> str:
        return str(self.neuron)


class Neuron(NeuronLayer):
    """Neurons that start each sample at rest and map currents (T, B, ...) to spikes (T, B, ...).

    Args:
        num_channels: C of a current (T, B, C, H, W), else its last dimension; needed by kinds with
            a learnt value per channel.
    """

    def __init__(self, neuron: NeuronConfig, num_channels: int = 0) -> None:
        super().__init__(neuron)
        self.learned = learned_of(neuron, num_channels)

    def forward(
        self,
        current: Tensor,
        timesteps: int | None = None,
        attended: tuple[Tensor, ...] = (),
        kernels: NeuronKernels | None = None,
    ) -> Tensor:
        """Return spikes (T, B, ...), in the current's type and memory layout.

        Args:
            current: (T, B, ...); or (1, B, ...) when it is the same at all timesteps.
            timesteps: T; needed only for (1, B, ...).
            attended: Keys and values of attention; its queries stand in place of the current.
            kernels: Kernels of that attention; see `LinearAttention.fired`.
        """
        if kernels is not None:
            return self._fire_fused(current, kernels, attended)
        timesteps = timesteps or current.shape[0]
        assert current.shape[0] in (1, timesteps), (current.shape, timesteps)
        return self.fire(current, timesteps)


class _Layout(NamedTuple):
    """The memory order of a timestep's values.

    Attributes:
        order: Dimensions except time, from the largest stride to the smallest.
        sizes: Their sizes, in this order.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, order: tuple[int, ...] | None = None) -> "_Layout":
        order = order or tuple(sorted(range(1, x.ndim), key=x.stride, reverse=True))
        return cls(order, tuple(x.shape[i] for i in order))

    def flat(self, x: Tensor) -> Tensor:
        """Return (T, ...) as (T, N, C) for the kernels: a view, if x has this layout."""
        numbers = math.prod(self.sizes)
        columns = math.gcd(numbers, 64)
        rows = x.permute(0, *self.order).reshape(len(x), numbers // columns, columns)
        return rows.contiguous()

    def shaped(self, rows: Tensor) -> Tensor:
        """Undo `flat`, as a view."""
        back = [self.order.index(i) + 1 for i in range(1, len(self.order) + 1)]
        return rows.view(len(rows), *self.sizes).permute(0, *back)


class NormNeuron(NeuronLayer):
    """Batch norm, an optional shortcut added to the normalised current, and the neuron.

    Args:
        drop_path: Probability of dropping the normalised current in training, which leaves only the
            shortcut. If above 0, norm, sum and neuron are separate passes over memory.
    """

    def __init__(
        self,
        num_channels: int,
        neuron: NeuronConfig,
        *,
        norm_scale: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(neuron)
        self.norm = BatchNorm(num_channels, scale=norm_scale)
        self.drop_path = DropPath(drop_path)
        self.learned = learned_of(neuron, num_channels)

    def forward(
        self,
        current: Tensor,
        timesteps: int,
        shortcut: Tensor | None = None,
        identity: Tensor | None = None,
        shortcut_norm: BatchNorm | None = None,
    ) -> Tensor:
        """Return spikes (T, B, C, H, W) in the current's type.

        Args:
            current: Output of a convolution, (T, B, C, H, W); or (1, B, C, H, W) if it is the same
                at all timesteps (the stem of a static image).
            timesteps: T.
            shortcut: Added to the normalised current, (T, B, C, H, W).
            identity: Added to the neurons' spikes, (T, B, C, H, W): spikes or other values.
            shortcut_norm: Normalises the shortcut before it is added.
        """
        assert current.shape[0] in (1, timesteps), (current.shape, timesteps)
        if self.is_fused() and self.drop_path.is_active:
            assert identity is None
            norm_kernels = dispatch.norm_kernels_for((current, shortcut), timesteps)
            if norm_kernels is not None:
                total = _norm_add(
                    self.norm, current, shortcut, shortcut_norm, self.drop_path, norm_kernels
                )
                return self.fire(total, timesteps)
        elif self.is_fused():
            kernels = dispatch.kernels_for(
                self.neuron,
                (current, shortcut, identity),
                timesteps,
                carries=self.carries,
                packs=self.norm.training
                and torch.is_grad_enabled()
                and self._joins_bytes(identity),
            )
            if kernels is not None:
                return self._fused(current, shortcut, identity, shortcut_norm, kernels)
        total = self.norm(current, timesteps // current.shape[0])
        total = total.expand(timesteps, *current.shape[1:])
        if shortcut is not None:
            added = shortcut if shortcut_norm is None else shortcut_norm(shortcut)
            total = self.drop_path.added(total, added)
        spikes = self.fire_by_definition(total, timesteps)
        return spikes if identity is None else spikes + identity

    def _joins_bytes(self, identity: Tensor | None) -> bool:
        """Return whether spikes plus ``identity`` fit into bytes; only a tensor with bytes has
        known levels."""
        if identity is None:
            return True
        packed = packed_of(identity)
        return packed is not None and packed.levels == self.neuron.levels

    def _fused(
        self,
        current: Tensor,
        shortcut: Tensor | None,
        identity: Tensor | None,
        shortcut_norm: BatchNorm | None,
        kernels: NeuronKernels,
    ) -> Tensor:
        norms = Norms(self.norm, None if shortcut is None else shortcut_norm)
        added, joined = (None if one is None else rows_of(one) for one in (shortcut, identity))
        start = None if (u := self.membrane) is None else rows_of(self._stacked(u))
        learned = self.for_kernels(current, kernels)
        x, parameters = rows_of(current), norms.parameters()
        rows, packed, end = FusedNormNeuron.apply(
            x, added, joined, start, *parameters, norms, kernels, *learned
        )
        if self.carries:
            _membranes.of[self] = self._unstacked(image_of(end, current.shape))
        bytes_of = None if packed is None else image_of(packed, current.shape)
        spikes = image_of(rows, current.shape)
        return self.with_bytes(spikes, bytes_of, are_sums=identity is not None)


def rows_of(x: Tensor) -> Tensor:
    """Return (T, B, C, H, W) as (T, B*H*W, C): a view, if channels are last in memory."""
    return x.permute(0, 1, 3, 4, 2).flatten(1, 3).contiguous()


def image_of(rows: Tensor, shape: torch.Size) -> Tensor:
    """Return (T, B*H*W, C) as a view (T, B, C, H, W); T may differ from that of ``shape``."""
    batch, channels, height, width = shape[1:]
    return rows.view(len(rows), batch, height, width, channels).permute(0, 1, 4, 2, 3)


class NormAdd(FusedLayer):
    """Batch norm plus a real-valued shortcut: the stream of membrane shortcuts.

    It keeps the current for the backward pass, and the shortcut if that is normalised.

    Args:
        drop_path: Probability of dropping the normalised current in training, which leaves only the
            shortcut. If above 0, the sum is a separate pass over memory.
    """

    def __init__(self, num_channels: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = BatchNorm(num_channels)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        current: Tensor,
        shortcut: Tensor | None = None,
        shortcut_norm: BatchNorm | None = None,
        *,
        copies: int = 1,
    ) -> Tensor:
        """Return the sum, (T, B, C, H, W), in the current's type.

        Args:
            current: Output of a convolution, (T, B, C, H, W).
            shortcut: Added to the normalised current, (T, B, C, H, W); or (1, B, C, H, W) if it is
                the same at all timesteps.
            shortcut_norm: Normalises the shortcut before it is added.
            copies: Number of equal timesteps that each given one stands for; see `BatchNorm`.
        """
        assert shortcut is None or shortcut.shape[0] in (1, current.shape[0])
        if self.is_fused():
            timesteps = copies * current.shape[0]
            kernels = dispatch.norm_kernels_for((current, shortcut), timesteps)
            if kernels is not None:
                drop_path = self.drop_path
                return _norm_add(self.norm, current, shortcut, shortcut_norm, drop_path, kernels)
        normalized = self.norm(current, copies)
        if shortcut is None:
            return normalized
        if shortcut_norm is not None:
            shortcut = shortcut_norm(shortcut, copies * current.shape[0] // shortcut.shape[0])
        return self.drop_path.added(normalized, shortcut)


def _norm_add(
    norm: BatchNorm,
    current: Tensor,
    shortcut: Tensor | None,
    shortcut_norm: BatchNorm | None,
    drop_path: DropPath,
    kernels: NormKernels,
) -> Tensor:
    """Compute norm and shortcut by one fused kernel, or several if the current may be dropped."""
    if shortcut is not None and drop_path.is_active:
        if shortcut_norm is not None:
            shortcut = _norm_add(shortcut_norm, shortcut, None, None, drop_path, kernels)
        normalized = _norm_add(norm, current, None, None, drop_path, kernels)
        return drop_path.added(normalized, shortcut)
    added = None if shortcut is None else rows_of(shortcut)
    norms = Norms(norm, None if shortcut is None else shortcut_norm)
    rows = FusedNormAdd.apply(rows_of(current), added, *norms.parameters(), norms, kernels)
    return image_of(rows, current.shape)


@contextlib.contextmanager
def carrying_membranes(
    layers: list[NeuronLayer], membranes: list[Tensor] | None
) -> Iterator[Callable[[], list[Tensor]]]:
    """Make the neurons, in this thread, start from membranes and keep their last ones.

    Args:
        layers: Layers, each of which runs once.
        membranes: Membranes of each after its last reset, (B, ...); None: all at rest.

    Yields:
        Function that returns, after they have run, their membranes after the last reset.
    """
    starts: Sequence[Tensor | None] = membranes or [None] * len(layers)
    _membranes.of.update(zip(layers, starts, strict=True))

    def ends() -> list[Tensor]:
        last = [_membranes.of[layer] for layer in layers]
        assert all(membrane is not None for membrane in last), "a layer did not run"
        return [membrane for membrane in last if membrane is not None]

    try:
        yield ends
    finally:
        for layer in layers:
            del _membranes.of[layer]
