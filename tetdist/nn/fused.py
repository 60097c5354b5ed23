"""Normalisation, an added shortcut, the neuron and added spikes as one operation: the fast path.

It computes what `NormNeuron.reference` says in one pass over memory each way. The forward pass
keeps the convolution's output and two numbers per channel; the backward pass computes the
normalised current and the membranes again from them, in registers, so nothing of the size of T
membranes is ever stored. The passes see every activation as (T, N, C), N = B*H*W, channels last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetdist.nn.batch_norm import BatchNorm


class Passes(NamedTuple):
    """The passes of one variant: neuron, T, whether all timesteps share one x, whether membranes
    are carried on, and whether spikes are packed, too."""

    timesteps: int
    statistics: Callable[..., tuple[Tensor, Tensor]]
    spikes: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    current_gradient: Callable[..., tuple[Tensor | None, ...]]
    input_gradient: Callable[..., Tensor]


class Affine(NamedTuple):
    """A normalisation, ``gain * x + offset``, and the statistics that it is made of; each (C,)."""

    gain: Tensor
    offset: Tensor
    mean: Tensor
    rstd: Tensor


class NormStatistics(NamedTuple):
    """A batch norm and the statistics by which it normalises this time."""

    norm: BatchNorm
    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: BatchNorm, x: Tensor, kernels: "Passes") -> "NormStatistics":
        if not norm.training:
            return cls(norm, norm.running_mean, norm.running_var)
        mean, var = norm.over_processes(*kernels.statistics(x.detach()))
        # Where one x serves all timesteps, mean and variance are those of its T copies, too.
        norm.record(mean, var, kernels.timesteps * x.shape[1])
        return cls(norm, mean, var)

    def affine(self, weight: Tensor, bias: Tensor) -> Affine:
        """Return the normalisation, with the norm's weight and bias as autograd has them."""
        rstd = torch.rsqrt(self.var + self.norm.eps)
        gain = self.norm.scale * weight * rstd
        return Affine(gain, bias - gain * self.mean, self.mean, rstd)


class FusedNormNeuron(torch.autograd.Function):
    """Forward and backward of norm + shortcut + neuron + identity on (T, N, C) tensors.

    Returns the spikes; where they are to be packed, the same in bytes; where it is to be carried
    on, the membrane after the last reset, (N, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        identity: Tensor | None,
        membrane: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        own: NormStatistics,
        others: NormStatistics | None,
        kernels: "Passes",
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        affine = own.affine(weight, bias)
        of_shortcut: Affine | None = None
        if others is not None:
            assert shortcut_weight is not None
            assert shortcut_bias is not None
            of_shortcut = others.affine(shortcut_weight, shortcut_bias)
        ctx.save_for_backward(x, shortcut, membrane, *affine, *(of_shortcut or ()))
        ctx.norm, ctx.training, ctx.kernels = own.norm, own.norm.training, kernels
        ctx.shortcut_norm = None if others is None else others.norm
        ctx.has_identity = identity is not None
        ctx.set_materialize_grads(False)
        spikes, packed, end = kernels.spikes(x, shortcut, affine, of_shortcut, membrane, identity)
        if packed is not None:
            ctx.mark_non_differentiable(packed)
        return spikes, packed, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shortcut, membrane, *saved = ctx.saved_tensors
        affine = Affine(*saved[:4])
        of_shortcut = Affine(*saved[4:]) if ctx.shortcut_norm is not None else None
        grad_spikes, _, grad_end = grad_outputs
        if grad_spikes is None:
            assert grad_end is not None
            grad_spikes = x.new_zeros(()).expand(ctx.kernels.timesteps, *grad_end.shape)
        # Gradient of the total current, of the convolution's own part of it (which is summed over
        # time where one output serves all timesteps), its sum per channel and those of its products
        # with both normalised currents, and the gradient of the membrane at the start.
        grad_total, grad_y, sum_grad, sum_grad_xhat, sum_grad_shortcut_hat, grad_start = (
            ctx.kernels.current_gradient(
                x,
                shortcut,
                affine,
                of_shortcut,
                membrane,
                grad_spikes.contiguous(),
                None if grad_end is None else grad_end.contiguous(),
            )
        )

        def through(
            norm: BatchNorm,
            x: Tensor,
            grad_y: Tensor,
            affine: Affine,
            sum_grad_xhat: Tensor,
            in_place: bool,
        ) -> Tensor:
            """Return the gradient of what was normalised."""
            if not ctx.training:
                return (grad_y * affine.gain).to(x.dtype)
            sums = norm.average_over_processes(torch.stack([sum_grad, sum_grad_xhat]))
            return ctx.kernels.input_gradient(x, grad_y, affine, *sums, in_place=in_place)

        grad_shortcut = grad_total if shortcut is not None else None
        if of_shortcut is not None:
            grad_shortcut = through(
                ctx.shortcut_norm, shortcut, grad_total, of_shortcut, sum_grad_shortcut_hat, False
            )
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Written over grad_y, unless that is the shortcut's gradient, too.
            in_place = grad_shortcut is not grad_y
            grad_x = through(ctx.norm, x, grad_y, affine, sum_grad_xhat, in_place)
        grad_shortcut_weight = grad_shortcut_bias = None
        if ctx.shortcut_norm is not None:
            grad_shortcut_weight = ctx.shortcut_norm.scale * sum_grad_shortcut_hat
            grad_shortcut_bias = sum_grad
        return (
            grad_x,
            None if grad_shortcut is None else grad_shortcut.to(shortcut.dtype),
            grad_spikes if ctx.has_identity else None,
            grad_start,
            ctx.norm.scale * sum_grad_xhat,
            sum_grad,
            grad_shortcut_weight,
            grad_shortcut_bias,
            *(None,) * 3,
        )
