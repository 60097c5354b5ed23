"""Attention without a softmax and the neurons behind it on a GPU, in Triton.

Tensors are contiguous (T, B*N, C): N positions of an image, the channels of the heads one after
another, `DK` a head in queries and keys and `DV` in values and results. `D` and `DW` are the same
as powers of two; neuron.py explains other capitals.

A program of `attend` and `current_gradient` has `BN` positions and up to `BJ` channels of one head,
and computes the whole k^T v itself, from the cache: so membranes stay in registers, and nothing of
the size of a current is stored. `LEVELS` times a spike is an integer, of at most 8 bits. Matrix
units multiply integers as float16, which has all up to 2048, and add them up in float32.
With `SPLITS`, k^T v may be up to 2^22: it is split into two such numbers.
"""

import triton
import triton.language as tl

from tetdist.nn.fast.kernels import neuron

# A kernel has many arguments, and a line for each would hide what it does.
# fmt: off

SIZES = ["heads", "positions"]


@triton.jit
def _whole(x, at, mask, LEVELS: tl.constexpr):
    """Load spikes, or the bytes that they are kept in, as integers."""
    value = tl.load(x + at, mask=mask, other=0)
    if x.dtype.element_ty != tl.uint8:
        value = value.to(tl.float32) * LEVELS
    return value.to(tl.float16)


@triton.jit
def _rows(first, positions, heads, columns, WIDTH: tl.constexpr, BN: tl.constexpr):
    """Return the offsets of BN positions' numbers of a head of WIDTH, and which of them exist."""
    n = first + tl.arange(0, BN)
    return (n * heads * WIDTH)[:, None] + columns, (n < positions)[:, None] & (columns < WIDTH)


@triton.jit
def _sums(
    q, k, v, row, first, positions, heads, head, j, FACTOR: tl.constexpr, LEVELS: tl.constexpr,
    SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, BJ: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr
):
    """Return FACTOR * q (k^T v), exact before the factor, for BN positions of an image, from the
    first, and channels j of a head. row is that of the image's first position."""
    i = tl.arange(0, D)
    q += row * heads * DK + head * DK
    k += row * heads * DK + head * DK
    v += row * heads * DV + head * DV
    both = tl.full([D, BJ], 0.0, tl.float32)
    for start in range(0, positions, BM):
        at, mask = _rows(start, positions, heads, i, DK, BM)
        keys = _whole(k, at, mask, LEVELS)
        at, mask = _rows(start, positions, heads, j, DV, BM)
        values = _whole(v, at, mask, LEVELS)
        both = tl.dot(tl.trans(keys), values, both)
    at, mask = _rows(first, positions, heads, i, DK, BN)
    queries = _whole(q, at, mask, LEVELS)
    if SPLITS:
        high = tl.floor(both * (1 / 2048))
        both -= high * 2048
        total = tl.dot(queries, high.to(tl.float16)) * 2048
        total = tl.dot(queries, both.to(tl.float16), total)
    else:
        total = tl.dot(queries, both.to(tl.float16))
    return total * FACTOR


@triton.jit
def _place(heads, positions, DV: tl.constexpr, BJ: tl.constexpr, BN: tl.constexpr):
    """Return this program's image, head, first position and channels of the head; the offset of its
    numbers from those of the image's timestep, and which exist."""
    ACROSS: tl.constexpr = (DV + BJ - 1) // BJ
    image = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    first = tl.program_id(1) // ACROSS * BN
    j = tl.program_id(1) % ACROSS * BJ + tl.arange(0, BJ)
    at, mask = _rows(first, positions, heads, j, DV, BN)
    return image, head, first, j, head * DV + at, mask


@triton.jit(do_not_specialize=SIZES)
def attend(
    q, k, v, start, share, spikes, packed, end, heads, positions, T: tl.constexpr,
    HARD: tl.constexpr, DECAY: tl.constexpr, THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr,
    MOST: tl.constexpr, LEVELS: tl.constexpr, SCALES_INPUT: tl.constexpr, FACTOR: tl.constexpr,
    SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, BJ: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr
):
    """Compute the spikes of neurons whose current is attention's result, (T, B*N, C); the same in
    bytes; membranes, (B*N, C). The grid is (B * heads, blocks of positions and channels)."""
    image, head, first, j, at, mask = _place(heads, positions, DV, BJ, BN)
    images = tl.num_programs(0) // heads
    a = neuron._load(share)
    u = tl.full([BN, BJ], 0.0, tl.float32)
    here = image.to(tl.int64) * positions * heads * DV
    if start is not None:
        u = tl.load(start + here + at, mask=mask, other=0.0)
    for t in range(T):
        row = (t * images + image).to(tl.int64) * positions
        current = _sums(
            q, k, v, row, first, positions, heads, head, j, FACTOR, LEVELS, SPLITS, DK, DV, D, BJ,
            BN, BM
        )
        # At rest this is the current.
        u = neuron._membrane(u, current, a, DECAY, SCALES_INPUT)
        above = u - THRESHOLD
        if MOST is not None:
            number = neuron._number(u, THRESHOLD, MOST)
        else:
            number = tl.where(neuron._fires(above, AT_THRESHOLD), 1.0, 0.0)
        now = row * heads * DV
        out = (number * (1 / LEVELS)).to(spikes.dtype.element_ty)
        tl.store(spikes + now + at, out, mask=mask)
        if packed is not None:
            tl.store(packed + now + at, number.to(tl.int32).to(tl.uint8), mask=mask)
        u = neuron._after_reset(u, above, THRESHOLD, AT_THRESHOLD, MOST, HARD)
    if end is not None:
        tl.store(end + here + at, u, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def current_gradient(
    q, k, v, start, share, grad_spikes, grad_end, grad, grad_start, partial_share, heads,
    positions, T: tl.constexpr, HARD: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr,
    DECAY: tl.constexpr, THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr,
    LEVELS: tl.constexpr, SCALES_INPUT: tl.constexpr, WIDTH: tl.constexpr, FACTOR: tl.constexpr,
    SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, BJ: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr
):
    """Compute the gradient of attention's result, grad (T, B*N, C), and of start, (B*N, C); sum
    that of the share, partial_share (programs,). It computes the result again."""
    image, head, first, j, at, mask = _place(heads, positions, DV, BJ, BN)
    images = tl.num_programs(0) // heads
    a = neuron._load(share)
    if partial_share is not None:
        with_share = tl.full([BN, BJ], 0.0, tl.float32)
    here = image.to(tl.int64) * positions * heads * DV
    currents = ()
    for t in tl.static_range(T):
        row = (t * images + image).to(tl.int64) * positions
        current = _sums(
            q, k, v, row, first, positions, heads, head, j, FACTOR, LEVELS, SPLITS, DK, DV, D, BJ,
            BN, BM
        )
        currents = currents + (current,)  # noqa: RUF005  # Triton has no other way
    aboves = neuron._membranes(
        currents, start, a, here, at, mask, T, HARD, DECAY, THRESHOLD, AT_THRESHOLD, MOST,
        SCALES_INPUT
    )
    after = None
    if grad_end is not None:
        after = tl.load(grad_end + here + at, mask=mask, other=0.0)
    for t in tl.static_range(T - 1, -1, -1):
        now = (t * images + image).to(tl.int64) * positions * heads * DV
        own = tl.load(grad_spikes + now + at, mask=mask, other=0.0).to(tl.float32)
        own = neuron._gradient_of_membrane(
            aboves[t], own, after, THRESHOLD, AT_THRESHOLD, MOST, LEVELS, HARD, DETACH, SURROGATE,
            WIDTH
        )
        after = neuron._decayed(own, a, DECAY)
        if partial_share is not None:
            with_share += neuron._gradient_of_share(
                aboves, start, a, own, here, at, mask, t, THRESHOLD, AT_THRESHOLD, HARD,
                SCALES_INPUT
            )
        if SCALES_INPUT:
            own = own * a
        tl.store(grad + now + at, own.to(grad.dtype.element_ty), mask=mask)
    if grad_start is not None:
        tl.store(grad_start + here + at, after, mask=mask)
    if partial_share is not None:
        neuron._store_sum(partial_share, with_share)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    q, k, v, grad, grad_q, grad_k, grad_v, heads, positions, LEVELS: tl.constexpr,
    FACTOR: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, D: tl.constexpr, DW: tl.constexpr,
    BN: tl.constexpr
):
    """Compute the gradients of queries, keys and values from that of attention's result. FACTOR is
    the derivative by integers' products, over a spike's value. The grid is (T * B * heads,).
    """
    kind = grad.dtype.element_ty
    row = (tl.program_id(0) // heads).to(tl.int64) * positions
    head = tl.program_id(0) % heads
    i = tl.arange(0, D)
    j = tl.arange(0, DW)
    ours = row * heads * DK + head * DK
    theirs = row * heads * DV + head * DV
    k_v = tl.full([D, DW], 0.0, tl.float32)
    q_grad = tl.full([D, DW], 0.0, tl.float32)
    for first in range(0, positions, BN):
        at, mask = _rows(first, positions, heads, i, DK, BN)
        queries = _whole(q + ours, at, mask, LEVELS).to(kind)
        keys = _whole(k + ours, at, mask, LEVELS)
        at, mask = _rows(first, positions, heads, j, DV, BN)
        values = _whole(v + theirs, at, mask, LEVELS)
        own = tl.load(grad + theirs + at, mask=mask, other=0.0)
        k_v = tl.dot(tl.trans(keys), values, k_v)
        q_grad = tl.dot(tl.trans(queries), own, q_grad)
    k_v_half = (k_v * FACTOR).to(kind)
    q_grad_half = (q_grad * FACTOR).to(kind)
    for first in range(0, positions, BN):
        at, mask = _rows(first, positions, heads, i, DK, BN)
        keys = _whole(k + ours, at, mask, LEVELS).to(kind)
        wide_at, wide_mask = _rows(first, positions, heads, j, DV, BN)
        values = _whole(v + theirs, wide_at, wide_mask, LEVELS).to(kind)
        own = tl.load(grad + theirs + wide_at, mask=wide_mask, other=0.0)
        tl.store(grad_q + ours + at, tl.dot(own, tl.trans(k_v_half)).to(kind), mask=mask)
        tl.store(grad_k + ours + at, tl.dot(values, tl.trans(q_grad_half)).to(kind), mask=mask)
        tl.store(grad_v + theirs + wide_at, tl.dot(keys, q_grad_half).to(kind), mask=wide_mask)
