"""Products of spikes, for attention.

All take and return (T, B, C, H, W). Positions are the tokens, and the channels of the heads follow
each other: C = heads * d. In memory the channels come last, so that a position's channels are a
token of C numbers, and nothing is transposed to become one.

**Exact sums.** Attention sums products of spikes, which are integers, and the neurons behind
it have a threshold of whole spikes, so a difference of one decides. The sums are therefore at least
float32, under autocast, too: bfloat16 rounds integers from 257 on, float16 from 2049 on, while
196 positions and 64 channels a head give sums up to 12544. float32 has all integers up to
2^24. On a GPU TensorFloat-32 is enough for spikes of 0 and 1: its ten bits of mantissa hold the
factors, spikes and sums over at most 2048 positions, and it adds up in float32.

`LinearAttention.fired` also runs the neurons behind it. In training on a GPU one kernel computes
both (fast/kernels/attention.py), also with exact sums, whatever the number of spikes.

**Bytes.** If spikes have their bytes (packed.py), only those are kept for the backward pass, which
recomputes the sums.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tetdist.nn.fast import dispatch
from tetdist.nn.norm_neuron import Neuron
from tetdist.nn.packed import Packed, converted, packed_of, with_packed
from tetdist.nn.precision import exact, wide_type


class Product(nn.Module):
    """A sum of products of spikes; evaluation/operations.py counts its operations."""

    def accumulates(self, *inputs: Tensor) -> Tensor:
        """Return the additions that a forward pass's spikes cause, () float64."""
        raise NotImplementedError  # Each product has its own.

    def synapses(self, *inputs: Tensor) -> int:
        """Return the multiply-accumulates that a forward pass of real numbers takes."""
        raise NotImplementedError  # Each product has its own.


class HeadSum(Product):
    """Sum over the channels of each head: (T, B, C, H, W) to (T, B, heads, H, W), float32.

    Each spike is one accumulate.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).sum(3, dtype=wide_type(x))

    def accumulates(self, *inputs: Tensor) -> Tensor:
        return _total(inputs[0])

    def synapses(self, *inputs: Tensor) -> int:
        return inputs[0].numel()

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class PositionSum(Product):
    """Sum over positions of the products of two: (T, B, C, H, W) twice to (T, B, C, 1, 1), float32.

    Each product that is 1 is one accumulate; computing the product itself is not counted.

    Args:
        spread: Module applied to the products, (T, B, C, H, W), before the sum.
    """

    def __init__(self, spread: nn.Module | None = None) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        if self.spread is not None:
            products: Tensor = self.spread(one * other)
            return products.sum((3, 4), keepdim=True, dtype=wide_type(one))
        packed, packed_other = packed_of(one), packed_of(other)
        if not (_is_whole(packed) and _is_whole(packed_other) and torch.is_grad_enabled()):
            return _position_sum(one, other)
        total: Tensor = _PositionSum.apply(one, other, packed.values, packed_other.values)
        return total

    def accumulates(self, *inputs: Tensor) -> Tensor:
        products = inputs[0] * inputs[1]
        return _total(products if self.spread is None else self.spread(products))

    def synapses(self, *inputs: Tensor) -> int:
        return inputs[0].numel()


def _position_sum(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((3, 4), keepdim=True, dtype=wide_type(one))


class _PositionSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, one: Tensor, other: Tensor, values: Tensor, other_values: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, other_values)
        ctx.dtype = one.dtype
        return _position_sum(one, other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, other_values = ctx.saved_tensors
        grad = grad_outputs[0].to(ctx.dtype)
        return grad * other_values, grad * values, None, None


def tokens(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return (T, B, C, H, W) as (T, B, heads, N, d)."""
    of_heads = x.permute(0, 1, 3, 4, 2).flatten(2, 3).unflatten(-1, (heads, -1))
    # One copy for all products; torch's `to` makes none where the type stays the same.
    return of_heads.transpose(2, 3).to(dtype, memory_format=torch.contiguous_format).contiguous()


def image(x: Tensor, shape: torch.Size) -> Tensor:
    """Undo `tokens` for images of ``shape``; d may differ."""
    rows = x.transpose(2, 3).flatten(3)
    return rows.unflatten(2, shape[3:]).permute(0, 1, 4, 2, 3)


class LinearAttention(Product):
    """Attention without a softmax: q (k^T v) times a scale for each head, float32.

    The result equals (q k^T) v; this order takes d operations per token and channel instead of N.

    Values may have more channels than queries and keys, d' a head. Operations: in k^T v each pair
    of spikes of the same token is an accumulate; a spike of q adds d' sums.
    """

    def __init__(self, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries and keys (T, B, C, H, W) and values (T, B, C', H, W) to (T, B, C', H, W)."""
        packed = [one for one in map(packed_of, (q, k, v)) if one is not None]
        if len(packed) < 3 or not torch.is_grad_enabled():
            return self.of(q, k, v)
        attended: Tensor = _LinearAttention.apply(q, k, v, packed, self)
        return attended

    def fired(self, q: Tensor, k: Tensor, v: Tensor, neuron: Neuron) -> Tensor:
        """Return the spikes of neurons whose current is the result, in the type of ``q``.

        Queries, keys and values must be spikes of the same kind of neuron.
        """
        if neuron.training and neuron.is_fused():
            of = (q, v, self.heads, self.scale)
            kernels = dispatch.attention_kernels_for(neuron.neuron, *of, carries=neuron.carries)
            if kernels is not None:
                fired: Tensor = neuron(q, attended=(k, v), kernels=kernels)
                return fired
        # The sums are float32; their neurons' outputs are spikes again.
        return converted(neuron(self(q, k, v)), q.dtype)

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention by its definition."""
        wide = wide_type(q)
        q_tokens, k_tokens, v_tokens = (tokens(x, self.heads, wide) for x in (q, k, v))
        with exact(q):
            attended = q_tokens @ (self.scale * (k_tokens.mT @ v_tokens))
        return image(attended, q.shape)

    def accumulates(self, *inputs: Tensor) -> Tensor:
        q, k, v = inputs
        of_k, of_v = (x.unflatten(2, (self.heads, -1)).sum(3, dtype=torch.float64) for x in (k, v))
        return (of_k * of_v).sum() + v.shape[2] // self.heads * _total(q)

    def synapses(self, *inputs: Tensor) -> int:
        q, _, v = inputs
        return 2 * q.numel() * (v.shape[2] // self.heads)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:.4g}"


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: list[Packed], attention: LinearAttention
    ) -> Tensor:
        ctx.save_for_backward(*(one.values for one in packed))
        ctx.levels, ctx.attention, ctx.dtype = [one.levels for one in packed], attention, q.dtype
        return attention.of(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        attention: LinearAttention = ctx.attention
        shape = ctx.saved_tensors[0].shape
        heads, dtype = attention.heads, grad_outputs[0].dtype
        grad = tokens(grad_outputs[0], heads, dtype)
        q, k, v = (
            Packed(tokens(values, heads, torch.uint8), levels).unpack(dtype)
            for values, levels in zip(ctx.saved_tensors, ctx.levels, strict=True)
        )
        with exact(grad):
            of_k_v = attention.scale * (q.mT @ grad)
            grads = grad @ (attention.scale * (v.mT @ k)), v @ of_k_v.mT, k @ of_k_v
        images = (image(one, shape).to(ctx.dtype) for one in grads)
        return *images, None, None


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return spikes (T, B, C, H, W) where the mask also spikes; above 1, products.

    Args:
        mask: Mask spikes per head and position, (T, B, heads, H, W), or per channel, (T, B, C, 1,
            1).
    """
    packed, packed_mask = packed_of(x), packed_of(mask)
    mask = mask.to(x.dtype)
    if not (_is_whole(packed) and _is_whole(packed_mask) and torch.is_grad_enabled()):
        return _where_masked(x, mask)
    y: Tensor = _Masked.apply(x, mask, packed.values, packed_mask.values)
    return with_packed(y, packed._replace(values=_where_masked(packed.values, packed_mask.values)))


def _where_masked(x: Tensor, mask: Tensor) -> Tensor:
    if mask.shape[2] == x.shape[2]:
        return x * mask
    return (x.unflatten(2, (mask.shape[2], -1)) * mask.unsqueeze(3)).flatten(2, 3)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, values: Tensor, mask_values: Tensor) -> Tensor:
        ctx.save_for_backward(values, mask_values)
        return _where_masked(x, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, mask_values = ctx.saved_tensors
        grad = grad_outputs[0]
        of_mask = grad * values
        if mask_values.shape[2] != values.shape[2]:
            of_mask = of_mask.unflatten(2, (mask_values.shape[2], -1)).sum(3)
        return (
            _where_masked(grad, mask_values),
            of_mask.sum_to_size(mask_values.shape),
            None,
            None,
        )


def _is_whole(packed: Packed | None) -> TypeGuard[Packed]:
    return packed is not None and packed.levels == 1


def _total(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)
