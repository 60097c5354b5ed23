"""Spikes in bytes and half bytes on a GPU, in Triton: packs and unpacks what packed.py keeps, in
one pass. Tensors are flat, in memory order."""

import triton
import triton.language as tl

SIZES = ["groups"]
# Products of `groups` need 64 bits: a large micro-batch's stem has more than 2^31 spikes.


@triton.jit(do_not_specialize=SIZES)
def unpack(values, numbers, groups, LEVELS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Convert ``groups * VEC`` bytes to numbers, divided by ``LEVELS``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < groups.to(tl.int64) * VEC
    kind = numbers.dtype.element_ty
    wide = tl.float64 if kind == tl.float64 else tl.float32
    value = tl.load(values + at, mask=mask, other=0).to(wide) * (1 / LEVELS)
    tl.store(numbers + at, value.to(kind), mask=mask)


@triton.jit
def _half(groups, VEC: tl.constexpr):
    """Return half of ``groups * VEC``, rounded up, so that the compiler sees its divisors."""
    if VEC > 1:
        half = groups.to(tl.int64) * (VEC // 2)
    else:
        half = (groups + 1) // 2
    return half


@triton.jit(do_not_specialize=SIZES)
def halve(values, halves, groups, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Pack two bytes below 16 into one, the first into its lower half."""
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    value = tl.load(values + at, mask=at < groups.to(tl.int64) * VEC, other=0)
    low, high = tl.split(tl.reshape(value, [BLOCK, 2]))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(halves + at, low | (high << 4), mask=at < _half(groups, VEC))


@triton.jit(do_not_specialize=SIZES)
def unpack_halves(
    halves, values, numbers, groups, LEVELS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    """Unpack half bytes to bytes, and to numbers as `unpack` does."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    both = tl.load(halves + at, mask=at < _half(groups, VEC), other=0)
    value = tl.reshape(tl.join(both & 15, both >> 4), [2 * BLOCK])
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    mask = at < groups.to(tl.int64) * VEC
    kind = numbers.dtype.element_ty
    wide = tl.float64 if kind == tl.float64 else tl.float32
    tl.store(values + at, value, mask=mask)
    tl.store(numbers + at, (value.to(wide) * (1 / LEVELS)).to(kind), mask=mask)
