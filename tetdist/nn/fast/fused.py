"""The fast path: normalisation, shortcut, neuron and added spikes as one operation.

It computes the end of `NormNeuron.forward` in one pass over memory each way. The forward pass keeps
the convolution's output, the shortcut and two numbers per channel; from these the backward pass
recomputes the normalised current and the membranes in registers, so nothing of the size of T
membranes is ever stored. The kernels see every activation as (T, N, C), N = B*H*W, channels last.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast.dynamics import Dynamics


class Affine(NamedTuple):
    """A normalisation, ``gain * x + offset``, and its statistics; each (C,)."""

    gain: Tensor
    offset: Tensor
    mean: Tensor
    rstd: Tensor


NO_AFFINE = (None,) * len(Affine._fields)


class Inputs(NamedTuple):
    """Inputs of a layer: the parts of its neurons' current, and their initial membranes.

    Attributes:
        x: The convolution's output, (T, N, C), or (1, N, C) if all timesteps share it; or queries,
            keys and values, in a tuple, if the current is attention's result.
        shortcut: Added to the normalised x, (T, N, C); without neurons also (1, N, C).
        affine: Normalises x. None: x is the current, without a shortcut, and N * C is the number of
            neurons, divided in any way.
        of_shortcut: Normalises the shortcut; None: it is added unchanged.
        start: Membranes after an earlier segment, (1, N, C), or the K last currents, (K, N, C), of
            a neuron that sums over time; None: at rest.
        learned: The neurons' own learnt values, from `NeuronConfig.for_kernels`.
    """

    x: Any
    shortcut: Tensor | None = None
    affine: Affine | None = None
    of_shortcut: Affine | None = None
    start: Tensor | None = None
    learned: tuple[Tensor, ...] = ()

    def save(self, ctx: Any) -> None:
        """Keep the tensors for the backward pass, in which `saved` returns them."""
        parts = self.x if isinstance(self.x, tuple) else (self.x,)
        ctx.num_parts = len(parts)
        affines = (*(self.affine or NO_AFFINE), *(self.of_shortcut or NO_AFFINE))
        ctx.save_for_backward(self.shortcut, self.start, *affines, *parts, *self.learned)

    @classmethod
    def saved(cls, ctx: Any) -> "Inputs":
        """Return what `save` kept."""
        shortcut, start, *tensors = ctx.saved_tensors
        affine, of_shortcut, tensors = tensors[:4], tensors[4:8], tensors[8:]
        parts, learned = tuple(tensors[: ctx.num_parts]), tuple(tensors[ctx.num_parts :])
        return cls(
            parts if len(parts) > 1 else parts[0],
            shortcut,
            None if affine[0] is None else Affine(*affine),
            None if of_shortcut[0] is None else Affine(*of_shortcut),
            start,
            learned,
        )


def split_learned(gradients: Tensor, learned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Divide the gradients of all learnt values, flat, into the values' shapes."""
    parts = gradients.split([value.numel() for value in learned])
    return tuple(part.view_as(value) for part, value in zip(parts, learned, strict=True))


class OutputGradients(NamedTuple):
    """Gradients of the spikes, (T, N, C), and of the next segment's start, if there is one."""

    spikes: Tensor
    end: Tensor | None


class Sums(NamedTuple):
    """Sums over T and N that the backward pass needs, each (C,).

    Attributes:
        grad: Sum of the current's gradient.
        grad_xhat: Sum of that gradient times x, normalised to mean 0 and variance 1.
        grad_shortcut_hat: The same for the shortcut; None: it is not normalised.
        grad_learned: Gradients of the neurons' learnt values.
        copy: A copy of the first two or three, (2 or 3, C), to be averaged over processes; None:
            `Norms.averaged` makes one.
    """

    grad: Tensor
    grad_xhat: Tensor
    grad_shortcut_hat: Tensor | None
    grad_learned: tuple[Tensor, ...] = ()
    copy: Tensor | None = None


class Averages(NamedTuple):
    """Sums of the gradient and of its products with the normalised x or shortcut, each (C,).

    They are averaged over the processes that normalise together. None: the statistics were
    constants, or there is no norm.
    """

    of_x: tuple[Tensor, Tensor] | None = None
    of_shortcut: tuple[Tensor, Tensor] | None = None


class NormParameters(NamedTuple):
    """Weight and bias of `Norms`, or their gradients, in the order in which autograd has them."""

    weight: Tensor
    bias: Tensor
    shortcut_weight: Tensor | None = None
    shortcut_bias: Tensor | None = None


class Norms(NamedTuple):
    """Norms of a convolution's output and of the shortcut (None: it is added unchanged)."""

    of_x: BatchNorm
    of_shortcut: BatchNorm | None = None

    def parameters(self) -> NormParameters:
        """Return weight and bias of both norms."""
        own, other = self
        if other is None:
            return NormParameters(own.weight, own.bias)
        return NormParameters(own.weight, own.bias, other.weight, other.bias)

    def normalized(self, kernels: "NormKernels", x: Tensor, shortcut: Tensor | None) -> Inputs:
        """Return x and the shortcut, (T, N, C), with their normalisations."""
        own, other = self
        if other is None:
            return Inputs(x, shortcut, kernels.normalization(own, x))
        assert shortcut is not None
        assert other.training == own.training
        affine = kernels.normalization(own, x)
        return Inputs(x, shortcut, affine, kernels.normalization(other, shortcut))

    def averaged(self, sums: Sums, *, training: bool) -> Averages:
        """Average the sums over the processes that normalise together."""
        if not training:
            return Averages()
        grad, products = sums.grad, [sums.grad_xhat]
        if sums.grad_shortcut_hat is not None:
            products.append(sums.grad_shortcut_hat)
        if self.of_x.average is not None:
            copy = torch.stack([grad, *products]) if sums.copy is None else sums.copy
            grad, *products = self.of_x.average(copy)
        of_shortcut = (grad, products[1]) if len(products) == 2 else None
        return Averages((grad, products[0]), of_shortcut)

    def gradients(self, sums: Sums) -> NormParameters:
        """Return the gradients of `parameters`, each (C,)."""
        weight = _times(self.of_x.scale, sums.grad_xhat)
        if self.of_shortcut is None:
            return NormParameters(weight, sums.grad)
        assert sums.grad_shortcut_hat is not None
        shortcut_weight = _times(self.of_shortcut.scale, sums.grad_shortcut_hat)
        return NormParameters(weight, sums.grad, shortcut_weight, sums.grad)


def _times(scale: float, x: Tensor) -> Tensor:
    # Most norms have scale 1, and on a GPU a product is one more kernel to launch.
    return x if scale == 1 else scale * x


class NormKernels(Protocol):
    """Kernels without neurons; tensors are contiguous.

    Attributes:
        timesteps: T, for the statistics: an input (1, N, C) stands for all timesteps.
    """

    timesteps: int

    def normalization(self, norm: BatchNorm, x: Tensor) -> Affine:
        """Make the normalisation of x, in training from its statistics, which it records."""

    def add(self, inputs: Inputs) -> Tensor:
        """Add the normalised x and the shortcut, (T, N, C)."""

    def add_sums(self, inputs: Inputs, grad: Tensor) -> Sums:
        """Return batch norm's backward sums for the gradient of the result of `add`.

        The shortcut is needed if it was normalised.
        """

    def norm_gradient(
        self, x: Tensor, grad: Tensor, affine: Affine, sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the gradient of x from that of the normalised x, both (T, N, C).

        ``sums`` are one part of `Averages`.
        """


class NeuronKernels(NormKernels, Protocol):
    """Kernels of one variant: neuron, T, and whether membranes are carried and spikes packed."""

    dynamics: Dynamics

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return spikes plus identity, (T, N, C); the same in bytes, or None; the start of the next
        segment, or None."""

    def current_gradient(
        self, inputs: Inputs, grads: OutputGradients
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Return the gradients of x, which is not normalised, of the start, if any, and of the
        learnt values."""

    def sums(self, inputs: Inputs, grads: OutputGradients) -> tuple[Sums, Any]:
        """Return batch norm's backward sums, and the argument ``kept`` of `gradients`."""

    def gradients(
        self,
        inputs: Inputs,
        grads: OutputGradients,
        kept: Any,
        averages: Averages,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x (None if not needed), shortcut and start."""


def _check_sizes(
    shape: tuple[int, ...], *tensors: Tensor | None, norms: Norms | tuple[()] = ()
) -> None:
    """Check the sizes of tensors (T, N, C), and of norms, since kernels take pointers only."""
    for tensor in tensors:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"a tensor for a kernel is {tuple(tensor.shape)} instead of {shape}")
    for norm in norms:
        if norm is not None and norm.num_channels != shape[-1]:
            raise ValueError(f"a norm has {norm.num_channels} channels instead of {shape[-1]}")


class FusedNeuron(torch.autograd.Function):
    """Forward and backward pass of neurons alone, for a current (T or 1, N, C).

    Attention's neurons take queries as ``x``, keys and values. Only ``kept`` is kept of these for
    the backward pass: the same tensors, perhaps in bytes. Returns what `FusedNormNeuron` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # noqa: ARG004  # autograd gives its gradient to it
        keys: Tensor | None,
        values: Tensor | None,  # noqa: ARG004
        start: Tensor | None,
        kernels: NeuronKernels,
        kept: tuple[Tensor, ...],
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        attends = keys is not None
        _check_sizes((kernels.dynamics.carried, *kept[-1].shape[1:]), start)
        inputs = Inputs(kept if attends else kept[0], start=start, learned=learned)
        inputs.save(ctx)
        ctx.kernels, ctx.attends = kernels, attends
        ctx.set_materialize_grads(False)
        spikes, packed, end = kernels.spikes(inputs, None)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs.saved(ctx)
        x = inputs.x[0] if ctx.attends else inputs.x
        grads = _gradients_of_outputs(x, ctx.kernels.timesteps, grad_outputs)
        grad_x, grad_start, grad_learned = ctx.kernels.current_gradient(inputs, grads)
        grads_x = grad_x if ctx.attends else (grad_x, None, None)
        return *grads_x, grad_start, None, None, *grad_learned


def _gradients_of_outputs(
    x: Tensor, timesteps: int, grad_outputs: tuple[Tensor | None, ...]
) -> OutputGradients:
    """Name autograd's gradients; those of the spikes are 0 if there are none."""
    grad_spikes, _, grad_end = grad_outputs
    if grad_spikes is None:
        assert grad_end is not None
        grad_spikes = x.new_zeros(()).expand(timesteps, *grad_end.shape[1:])
    grad_end = None if grad_end is None else grad_end.contiguous()
    return OutputGradients(grad_spikes.contiguous(), grad_end)


class FusedNormNeuron(torch.autograd.Function):
    """Forward and backward pass of norm + shortcut + neuron + identity on (T, N, C) tensors.

    ``weight`` to ``shortcut_bias`` are `Norms.parameters`. Returns the spikes; the same in bytes,
    if packed; the start of the next segment, if carried.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        identity: Tensor | None,
        start: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        norms: Norms,
        kernels: NeuronKernels,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        del weight, bias, shortcut_weight, shortcut_bias  # The norms have them.
        _check_sizes((kernels.timesteps, *x.shape[1:]), shortcut, identity, norms=norms)
        _check_sizes((kernels.dynamics.carried, *x.shape[1:]), start)
        inputs = norms.normalized(kernels, x, shortcut)._replace(start=start, learned=learned)
        inputs.save(ctx)
        ctx.norms, ctx.kernels, ctx.training = norms, kernels, norms.of_x.training
        ctx.has_identity = identity is not None
        ctx.set_materialize_grads(False)
        spikes, packed, end = kernels.spikes(inputs, identity)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, norms = Inputs.saved(ctx), ctx.norms
        grads = _gradients_of_outputs(inputs.x, ctx.kernels.timesteps, grad_outputs)
        sums, kept = ctx.kernels.sums(inputs, grads)
        averages = norms.averaged(sums, training=ctx.training)
        grad_x, grad_shortcut, grad_start = ctx.kernels.gradients(
            inputs, grads, kept, averages, needs_x=ctx.needs_input_grad[0]
        )
        if grad_shortcut is not None and inputs.shortcut is not None:
            grad_shortcut = grad_shortcut.to(inputs.shortcut.dtype)
        grad_identity = grad_outputs[0] if ctx.has_identity else None
        return (
            *(grad_x, grad_shortcut, grad_identity, grad_start),
            *norms.gradients(sums),
            *(None, None),
            *sums.grad_learned,
        )


class FusedNormAdd(torch.autograd.Function):
    """Forward and backward pass of norm + shortcut on (T, N, C); the shortcut may be (1, N, C).

    Keeps x for the backward pass, and the shortcut if it is normalised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        norms: Norms,
        kernels: NormKernels,
    ) -> Tensor:
        del weight, bias, shortcut_weight, shortcut_bias  # The norms have them.
        timesteps = 1 if shortcut is not None and len(shortcut) == 1 else len(x)
        _check_sizes((timesteps, *x.shape[1:]), shortcut, norms=norms)
        inputs = norms.normalized(kernels, x, shortcut)
        kept = None if norms.of_shortcut is None else shortcut
        inputs._replace(shortcut=kept).save(ctx)
        ctx.norms, ctx.kernels, ctx.training = norms, kernels, norms.of_x.training
        ctx.shared = shortcut is not None and shortcut.shape[0] < x.shape[0]
        return kernels.add(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, norms = Inputs.saved(ctx), ctx.norms
        kernels: NormKernels = ctx.kernels
        assert inputs.affine is not None
        grad = grad_outputs[0].contiguous()
        sums = kernels.add_sums(inputs, grad)
        averages = norms.averaged(sums, training=ctx.training)
        grad_x = grad_shortcut = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.norm_gradient(inputs.x, grad, inputs.affine, averages.of_x)
        if ctx.needs_input_grad[1]:
            grad_shortcut = grad.sum(0, keepdim=True) if ctx.shared else grad
            if inputs.of_shortcut is not None:
                assert inputs.shortcut is not None
                grad_shortcut = kernels.norm_gradient(
                    inputs.shortcut, grad_shortcut, inputs.of_shortcut, averages.of_shortcut
                )
        return grad_x, grad_shortcut, *norms.gradients(sums), None, None
