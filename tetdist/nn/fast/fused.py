"""Normalisation, an added shortcut, the neuron and added spikes as one operation: the fast path.

It computes what the end of `NormNeuron.forward` says in one pass over memory each way. The forward
pass keeps the convolution's output and two numbers per channel; the backward pass computes the
normalised current and the membranes again from them, in registers, so nothing of the size of T
membranes is ever stored. The kernels see every activation as (T, N, C), N = B*H*W, channels last.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetdist.nn.batch_norm import BatchNorm


class Affine(NamedTuple):
    """A normalisation, ``gain * x + offset``, and the statistics that it is made of; each (C,)."""

    gain: Tensor
    offset: Tensor
    mean: Tensor
    rstd: Tensor


class Inputs(NamedTuple):
    """Inputs of a layer's neurons: the parts of their current, and the membranes at the start.

    Attributes:
        x: The convolution's output, (T, N, C), or (1, N, C) where all timesteps share it.
        shortcut: Added to the normalised x, (T, N, C).
        affine: Normalises x; None: x is the current, and N and C any two numbers whose product is
            that of neurons. Then there is no shortcut.
        of_shortcut: Normalises the shortcut; None: it is added as it is.
        start: Membranes after an earlier stretch of time, (N, C); None: at rest.
        learned: What the neurons learn themselves, as `NeuronConfig.for_kernels` has it.
    """

    x: Tensor
    shortcut: Tensor | None
    affine: Affine | None
    of_shortcut: Affine | None
    start: Tensor | None
    learned: tuple[Tensor, ...] = ()


class Sums(NamedTuple):
    """Sums over T and N, each (C,): of the current's gradient, and of its products with the
    normalised x and the normalised shortcut, both before gain and offset. And the gradients of what
    the neurons learn."""

    grad: Tensor
    grad_xhat: Tensor
    grad_shortcut_hat: Tensor | None
    grad_learned: tuple[Tensor, ...] = ()


class Norms(NamedTuple):
    """The norm of a convolution's output, and that of the shortcut; None: it is added as it is."""

    of_x: BatchNorm
    of_shortcut: BatchNorm | None = None

    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of both norms."""
        other = self.of_shortcut
        others = [None, None] if other is None else [other.weight, other.bias]
        return [self.of_x.weight, self.of_x.bias, *others]

    def normalizations(
        self, kernels: "NormKernels", x: Tensor, shortcut: Tensor | None, parameters: Sequence[Any]
    ) -> tuple[Affine, Affine | None]:
        """Make the normalisations of x and the shortcut; `parameters` are as autograd has them."""
        affine = kernels.normalization(self.of_x, x, *parameters[:2])
        if self.of_shortcut is None:
            return affine, None
        assert shortcut is not None
        assert self.of_shortcut.training == self.of_x.training
        return affine, kernels.normalization(self.of_shortcut, shortcut, *parameters[2:4])

    def averaged(
        self, sums: Sums, *, training: bool
    ) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """The sums for x and for the shortcut, over the processes that normalise together.

        None: it is not normalised, or not by statistics of its own.
        """

        def averaged(norm: BatchNorm, products: Tensor) -> tuple[Tensor, Tensor]:
            if norm.average is None:
                return sums.grad, products
            first, second = norm.average_over_processes(torch.stack([sums.grad, products]))
            return first, second

        if not training:
            return None, None
        of_shortcut = None
        if self.of_shortcut is not None:
            assert sums.grad_shortcut_hat is not None
            of_shortcut = averaged(self.of_shortcut, sums.grad_shortcut_hat)
        return averaged(self.of_x, sums.grad_xhat), of_shortcut

    def gradients(self, sums: Sums) -> tuple[Tensor | None, ...]:
        """Gradients of `parameters`, each (C,)."""
        of_x = (_times(self.of_x.scale, sums.grad_xhat), sums.grad)
        if self.of_shortcut is None:
            return *of_x, None, None
        assert sums.grad_shortcut_hat is not None
        return *of_x, _times(self.of_shortcut.scale, sums.grad_shortcut_hat), sums.grad


def _times(scale: float, x: Tensor) -> Tensor:
    # Most norms have no scale of their own, and on a GPU a product is one kernel more to start.
    return x if scale == 1 else scale * x


class NormKernels(Protocol):
    """Kernels without neurons. Tensors are without gaps.

    Attributes:
        timesteps: T, which counts for the statistics: what is given as (1, N, C) stands for all.
    """

    timesteps: int

    def normalization(self, norm: BatchNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Affine:
        """Make the normalisation of x, by its own statistics in training, which are recorded then.

        weight and bias are those of the norm, as autograd has them.
        """

    def add(
        self, x: Tensor, shortcut: Tensor | None, affine: Affine, of_shortcut: Affine | None
    ) -> Tensor:
        """The normalised x plus the shortcut, normalised if ``of_shortcut`` is given, (T, N, C).

        The shortcut may be (1, N, C), for all timesteps.
        """

    def add_sums(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        affine: Affine,
        of_shortcut: Affine | None,
        grad: Tensor,
    ) -> Sums:
        """The sums that batch norm's backward pass needs, of the gradient of what `add` returned.

        The shortcut is needed where it was normalised.
        """

    def norm_gradient(
        self, x: Tensor, grad: Tensor, affine: Affine, sums: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The gradient of x of that of the normalised x, both (T, N, C).

        Args:
            x: What was normalised.
            grad: The gradient of the normalised x.
            affine: What normalised it.
            sums: Of the gradient and of its products with the normalised x, averaged over the
                processes that normalise together; None: the statistics were constants.
        """


class NeuronKernels(NormKernels, Protocol):
    """Kernels of one variant: neuron, T, whether membranes are carried on, and whether spikes
    are packed, too."""

    def spikes(
        self, inputs: Inputs, identity: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Spikes plus identity, (T, N, C); the same in bytes, or None; membranes after the last
        reset, (N, C), or None."""

    def current_gradient(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Gradients of x, which is not normalised, of the start, if there is one, and of what the
        neurons learn."""

    def sums(
        self, inputs: Inputs, grad_spikes: Tensor, grad_end: Tensor | None
    ) -> tuple[Sums, Any]:
        """The sums that batch norm's backward pass needs, and what `gradients` is to be given."""

    def gradients(
        self,
        inputs: Inputs,
        grad_spikes: Tensor,
        grad_end: Tensor | None,
        kept: Any,
        of_x: tuple[Tensor, Tensor] | None,
        of_shortcut: tuple[Tensor, Tensor] | None,
        *,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x (None where it needs none), shortcut and start.

        Args:
            inputs: Those of `sums`.
            grad_spikes: Likewise, (T, N, C).
            grad_end: Likewise, (N, C).
            kept: What `sums` returned.
            of_x: Sums of the gradient and of its products with the normalised x, averaged over the
                processes that normalise together; None: the statistics were constants.
            of_shortcut: The same of the shortcut, where that is normalised.
            needs_x: Whether x needs a gradient.
        """


class FusedNeuron(torch.autograd.Function):
    """Forward and backward of neurons alone, of a current (T or 1, N, C).

    Returns what `FusedNormNeuron` does. Kept for the backward pass is the current.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, membrane: Tensor | None, kernels: NeuronKernels, *learned: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, membrane, *learned)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        spikes, packed, end = kernels.spikes(Inputs(x, None, None, None, membrane, learned), None)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, membrane, *learned = ctx.saved_tensors
        inputs = Inputs(x, None, None, None, membrane, tuple(learned))
        grads = _gradients_of_outputs(x, ctx.kernels.timesteps, grad_outputs)
        grad_x, grad_start, grad_learned = ctx.kernels.current_gradient(inputs, *grads)
        return grad_x, grad_start, None, *grad_learned


def _gradients_of_outputs(
    x: Tensor, timesteps: int, grad_outputs: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of spikes, which are 0 if there are none, and of the last membranes."""
    grad_spikes, _, grad_end = grad_outputs
    if grad_spikes is None:
        assert grad_end is not None
        grad_spikes = x.new_zeros(()).expand(timesteps, *grad_end.shape)
    return grad_spikes.contiguous(), None if grad_end is None else grad_end.contiguous()


class FusedNormNeuron(torch.autograd.Function):
    """Forward and backward of norm + shortcut + neuron + identity on (T, N, C) tensors.

    ``parameters`` are those of the norms, and what the neurons learn. Returns the spikes; where
    they are to be packed, the same in bytes; where it is to be carried on, the membrane after the
    last reset, (N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        identity: Tensor | None,
        membrane: Tensor | None,
        norms: Norms,
        kernels: NeuronKernels,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        affine, of_shortcut = norms.normalizations(kernels, x, shortcut, parameters)
        learned = parameters[4:]
        ctx.save_for_backward(x, shortcut, membrane, *affine, *(of_shortcut or ()), *learned)
        ctx.norms, ctx.kernels, ctx.training = norms, kernels, norms.of_x.training
        ctx.has_identity = identity is not None
        ctx.set_materialize_grads(False)
        inputs = Inputs(x, shortcut, affine, of_shortcut, membrane, learned)
        spikes, packed, end = kernels.spikes(inputs, identity)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shortcut, membrane, *saved = ctx.saved_tensors
        norms: Norms = ctx.norms
        affine, saved = Affine(*saved[:4]), saved[4:]
        affine_of_shortcut = None
        if norms.of_shortcut is not None:
            affine_of_shortcut, saved = Affine(*saved[:4]), saved[4:]
        inputs = Inputs(x, shortcut, affine, affine_of_shortcut, membrane, tuple(saved))
        grads = _gradients_of_outputs(x, ctx.kernels.timesteps, grad_outputs)
        sums, kept = ctx.kernels.sums(inputs, *grads)
        averages = norms.averaged(sums, training=ctx.training)
        grad_x, grad_shortcut, grad_start = ctx.kernels.gradients(
            inputs, *grads, kept, *averages, needs_x=ctx.needs_input_grad[0]
        )
        return (
            grad_x,
            None if grad_shortcut is None else grad_shortcut.to(shortcut.dtype),
            grad_outputs[0] if ctx.has_identity else None,
            grad_start,
            *(None, None),
            *norms.gradients(sums),
            *sums.grad_learned,
        )


class FusedNormAdd(torch.autograd.Function):
    """Forward and backward of norm + shortcut, of (T, N, C); the shortcut may be (1, N, C).

    Kept for the backward pass is x, and the shortcut where that is normalised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        norms: Norms,
        kernels: NormKernels,
        *parameters: Tensor,
    ) -> Tensor:
        affine, of_shortcut = norms.normalizations(kernels, x, shortcut, parameters)
        kept = None if of_shortcut is None else shortcut
        ctx.save_for_backward(x, kept, *affine, *(of_shortcut or ()))
        ctx.norms, ctx.kernels, ctx.training = norms, kernels, norms.of_x.training
        ctx.shared = shortcut is not None and shortcut.shape[0] < x.shape[0]
        return kernels.add(x, shortcut, affine, of_shortcut)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, shortcut, *saved = ctx.saved_tensors
        norms: Norms = ctx.norms
        kernels: NormKernels = ctx.kernels
        affine = Affine(*saved[:4])
        affine_of_shortcut = Affine(*saved[4:]) if norms.of_shortcut is not None else None
        grad = grad_outputs[0].contiguous()
        sums = kernels.add_sums(x, shortcut, affine, affine_of_shortcut, grad)
        of_x, of_shortcut = norms.averaged(sums, training=ctx.training)
        grad_x = grad_shortcut = None
        if ctx.needs_input_grad[0]:
            grad_x = kernels.norm_gradient(x, grad, affine, of_x)
        if ctx.needs_input_grad[1]:
            grad_shortcut = grad.sum(0, keepdim=True) if ctx.shared else grad
            if affine_of_shortcut is not None:
                grad_shortcut = kernels.norm_gradient(
                    shortcut, grad_shortcut, affine_of_shortcut, of_shortcut
                )
        return grad_x, grad_shortcut, None, None, *norms.gradients(sums)
