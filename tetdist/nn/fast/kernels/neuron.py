"""Normalisation and neurons on a GPU, in Triton: the kernels of fused.py.

Tensors are contiguous (T, N, C): N = B*H*W, channels last. "Wide" is the compute type: float32, or
float64 for float64; gains, offsets, membranes and sums have that type.

A program processes tiles of `BN` rows and `BC` channels, `steps` of them one below the other;
membranes stay in registers. A sum over rows consists of one partial sum per program, which a second
kernel adds up in float64. The caller divides the rows, depending only on shapes, and there are no
atomics. So results are bitwise reproducible.

The number of channels is ``groups * VEC``: so the compiler knows that rows begin at multiples of
`VEC`, and loads 16 bytes at a time. It knows nothing else about shapes, so one compilation serves
all layers. Names in capitals are compile-time constants; an absent tensor is None.

Without normalisation, tensors are just contiguous numbers, divided into N and C in any way.

No file of tetdist imports Triton before dispatch.py has decided to use it.
"""

import triton
import triton.language as tl

# A kernel has many arguments, and a line for each would hide what it does.
# fmt: off

SIZES = ["rows", "groups", "steps", "blocks", "rows_of_block", "period"]


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _wide(x):
    """Return numbers in the compute type."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _at_least_0(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reciprocal(x):
    """Return 1 / x, for float64 up to the last bit but one: the hardware has no such instruction,
    and Triton's division calls a function."""
    if x.dtype == tl.float64:
        r = (1.0 / x.to(tl.float32)).to(tl.float64)
        r = r * (2.0 - x * r)
        r = r * (2.0 - x * r)
    else:
        r = 1.0 / x
    return r


@triton.jit
def _channels(groups, VEC: tl.constexpr, BC: tl.constexpr):
    """Return C, and the channels of this program."""
    return groups * VEC, tl.program_id(1) * BC + tl.arange(0, BC)


@triton.jit
def _numbers(groups, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Return C, the channels of this program, a tile's rows, and its numbers' offsets."""
    C, c = _channels(groups, VEC, BC)
    r = tl.arange(0, BN)
    return C, c, r, r[:, None] * C + c[None, :]


@triton.jit
def _load(base):
    """Load a number; None if there is none."""
    number = None
    if base is not None:
        number = tl.load(base)
    return number


@triton.jit
def _load_row(base, c, C):
    """Load one number per channel, (1, BC); None if there are none."""
    row = None
    if base is not None:
        row = tl.load(base + c, mask=c < C, other=0.0)[None, :]
    return row


@triton.jit
def _tile(i, steps, rows, r, c, C):
    """Return the offset of the first row of this program's tile i, and which numbers exist."""
    first = (tl.program_id(0).to(tl.int64) * steps + i) * r.shape[0]
    return first * C, (r < rows - first)[:, None] & (c < C)[None, :]


# -------------------------------------------------------------------------------------- statistics


@triton.jit(do_not_specialize=SIZES)
def statistics(
    x, partial, rows, groups, steps, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Sum a program's rows of x, (rows, C), and their squares, both relative to its first row.

    Subtracting a squared mean from a mean square would cancel; relative to a value of the same
    channel it does not. partial is (blocks, 3, C): that value and the two sums.
    """
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    block = tl.program_id(0).to(tl.int64)
    wide = partial.dtype.element_ty
    shift = tl.load(x + block * steps * BN * C + c, mask=c < C, other=0.0).to(wide)
    total = tl.full([BN, BC], 0.0, wide)
    squares = total
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        above = tl.load(x + here + at, mask=mask, other=0.0).to(wide) - shift[None, :]
        above = tl.where(mask, above, 0.0)
        total += above
        squares += above * above
    partial += block * 3 * C
    kept = c < C
    tl.store(partial + c, shift, mask=kept)
    tl.store(partial + C + c, tl.reduce(total, 0, _add), mask=kept)
    tl.store(partial + 2 * C + c, tl.reduce(squares, 0, _add), mask=kept)


@triton.jit
def _normalization(
    mean, var, weight, bias, affine, mean_sum, var_sum, count, c, C, SCALE: tl.constexpr,
    EPS: tl.constexpr, RECORDS: tl.constexpr
):
    """Write gain, offset, mean and 1/std, (4, C); add mean and variance to those of the step.

    ``count`` is the number of values, float64; mean and var are wide, for the channels c.
    """
    kept = c < C
    wide = affine.dtype.element_ty
    v = var.to(tl.float64) + EPS
    # Newton's steps on the hardware's approximation, so that 1/sqrt is rounded once.
    r = tl.rsqrt(v.to(tl.float32)).to(tl.float64)
    r = r * (1.5 - 0.5 * v * r * r)
    r = r * (1.5 - 0.5 * v * r * r)
    rstd = r.to(wide)
    gain = tl.load(weight + c, mask=kept, other=0.0).to(wide) * SCALE * rstd
    offset = tl.load(bias + c, mask=kept, other=0.0).to(wide) - gain * mean
    tl.store(affine + c, gain, mask=kept)
    tl.store(affine + C + c, offset, mask=kept)
    tl.store(affine + 2 * C + c, mean, mask=kept)
    tl.store(affine + 3 * C + c, rstd, mask=kept)
    if RECORDS:
        # The running variance is the unbiased estimate.
        unbiased = (count * _reciprocal(tl.maximum(count - 1.0, 1.0))).to(wide)
        tl.store(mean_sum + c, tl.load(mean_sum + c, mask=kept, other=0.0) + mean, mask=kept)
        more = tl.load(var_sum + c, mask=kept, other=0.0) + var * unbiased
        tl.store(var_sum + c, more, mask=kept)


@triton.jit(do_not_specialize=[*SIZES, "values"])
def finish_statistics(
    partial, moments, weight, bias, affine, mean_sum, var_sum, values, rows, rows_of_block, blocks,
    groups, SCALE: tl.constexpr, EPS: tl.constexpr, RECORDS: tl.constexpr, VEC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr
):
    """Compute mean and biased variance from the sums of `statistics`, in float64.

    If they are averaged with other processes' first, write mean and mean square to moments, (2, C)
    float64; else (None) write what `normalization` computes from them.
    """
    C, c = _channels(groups, VEC, BC)
    p = tl.arange(0, BP)
    count = rows.to(tl.float64)
    total = tl.full([BP, BC], 0.0, tl.float64)
    for i in range(0, blocks, BP):
        mask = (i + p < blocks)[:, None] & (c < C)[None, :]
        here = partial + (i + p)[:, None] * 3 * C + c[None, :]
        own = tl.minimum(rows - (i + p) * rows_of_block, rows_of_block)
        shift = tl.load(here, mask=mask, other=0.0).to(tl.float64)
        above = tl.load(here + C, mask=mask, other=0.0).to(tl.float64)
        total += tl.where(mask, shift * own.to(tl.float64)[:, None] + above, 0.0)
    per_value = _reciprocal(count)
    mean = tl.reduce(total, 0, _add) * per_value
    squares = tl.full([BP, BC], 0.0, tl.float64)
    for i in range(0, blocks, BP):
        mask = (i + p < blocks)[:, None] & (c < C)[None, :]
        here = partial + (i + p)[:, None] * 3 * C + c[None, :]
        own = tl.minimum(rows - (i + p) * rows_of_block, rows_of_block)
        own = tl.maximum(own, 1).to(tl.float64)[:, None]
        shift = tl.load(here, mask=mask, other=0.0).to(tl.float64)
        above = tl.load(here + C, mask=mask, other=0.0).to(tl.float64) * _reciprocal(own)
        within = tl.load(here + 2 * C, mask=mask, other=0.0).to(tl.float64) - own * above * above
        apart = shift + above - mean[None, :]
        squares += tl.where(mask, tl.maximum(within, 0.0) + own * apart * apart, 0.0)
    var = tl.reduce(squares, 0, _add) * per_value
    wide = partial.dtype.element_ty
    mean = mean.to(wide)
    var = var.to(wide)
    if moments is not None:
        # In float64, so that subtracting the squared mean from the mean square loses nothing.
        mean64 = mean.to(tl.float64)
        tl.store(moments + c, mean64, mask=c < C)
        tl.store(moments + C + c, var.to(tl.float64) + mean64 * mean64, mask=c < C)
    else:
        _normalization(
            mean, var, weight, bias, affine, mean_sum, var_sum, values.to(tl.float64), c, C, SCALE,
            EPS, RECORDS
        )


@triton.jit(do_not_specialize=[*SIZES, "values"])
def normalization(
    moments, mean, var, weight, bias, affine, mean_sum, var_sum, values, groups,
    SCALE: tl.constexpr, EPS: tl.constexpr, RECORDS: tl.constexpr, VEC: tl.constexpr,
    BC: tl.constexpr
):
    """Write gain, offset, mean and 1/std, affine (4, C), of the mean and variance, each (C,); or,
    if given, of the moments of `finish_statistics`."""
    C = groups * VEC
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    wide = affine.dtype.element_ty
    if moments is not None:
        m = tl.load(moments + c, mask=c < C, other=0.0)
        v = tl.load(moments + C + c, mask=c < C, other=0.0) - m * m
    else:
        m = tl.load(mean + c, mask=c < C, other=0.0)
        v = tl.load(var + c, mask=c < C, other=0.0)
    _normalization(
        m.to(wide), v.to(wide), weight, bias, affine, mean_sum, var_sum, values.to(tl.float64), c,
        C, SCALE, EPS, RECORDS
    )


# ------------------------------------------------------------------------- norm, and a shortcut


@triton.jit
def _rows_of_shortcut(i, steps, period, r, c, C, BN: tl.constexpr, SHARED: tl.constexpr):
    """Return the rows of a tile's shortcut: its own, or the first timestep's if it is shared."""
    if SHARED:
        row = ((tl.program_id(0) * steps + i) * BN + r) % period
        at = row.to(tl.int64)[:, None] * C + c[None, :]
    else:
        first = (tl.program_id(0).to(tl.int64) * steps + i) * BN
        at = first * C + (r[:, None] * C + c[None, :])
    return at


@triton.jit(do_not_specialize=SIZES)
def add(
    x, shortcut, gain, offset, shortcut_gain, shortcut_offset, out, rows, period, groups, steps,
    SHARED: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Add the normalised x and the shortcut, (rows, C); a shared shortcut is (period, C)."""
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    g = _load_row(gain, c, C)
    o = _load_row(offset, c, C)
    g2 = _load_row(shortcut_gain, c, C)
    o2 = _load_row(shortcut_offset, c, C)
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        total = _normalized(tl.load(x + here + at, mask=mask), g, o)
        if shortcut is not None:
            there = _rows_of_shortcut(i, steps, period, r, c, C, BN, SHARED)
            total += _normalized(tl.load(shortcut + there, mask=mask), g2, o2)
        tl.store(out + here + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_rows(partial, block, c, C, total, with_x, with_shortcut):
    """Store a program's sums of rows, partial (blocks, 2, C), or (blocks, 3, C) if there are three.
    """
    number: tl.constexpr = 2 if with_shortcut is None else 3
    partial += block * number * C + c
    tl.store(partial, tl.reduce(total, 0, _add), mask=c < C)
    tl.store(partial + C, tl.reduce(with_x, 0, _add), mask=c < C)
    if with_shortcut is not None:
        tl.store(partial + 2 * C, tl.reduce(with_shortcut, 0, _add), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def add_sums(
    x, shortcut, mean, shortcut_mean, grad, partial, rows, period, groups, steps,
    SHARED: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Sum a program's rows of the gradient, and of its product with each normalised input less its
    mean. partial is (blocks, 2, C), or with a normalised shortcut (blocks, 3, C)."""
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    wide = mean.dtype.element_ty
    m = _load_row(mean, c, C)
    m2 = _load_row(shortcut_mean, c, C)
    total = tl.full([BN, BC], 0.0, wide)
    with_x = total
    with_shortcut = None if shortcut_mean is None else total
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        # What is masked is 0.
        g = _wide(tl.load(grad + here + at, mask=mask, other=0.0))
        total += g
        with_x += g * (_wide(tl.load(x + here + at, mask=mask, other=0.0)) - m)
        if shortcut_mean is not None:
            there = _rows_of_shortcut(i, steps, period, r, c, C, BN, SHARED)
            with_shortcut += g * (_wide(tl.load(shortcut + there, mask=mask, other=0.0)) - m2)
    _store_rows(partial, tl.program_id(0), c, C, total, with_x, with_shortcut)


@triton.jit
def _mean(total, rows, T: tl.constexpr, c, C):
    """Return sums over T * rows values divided by their number, (1, BC); None without sums."""
    mean = None
    if total is not None:
        mean = _load_row(total, c, C) * _reciprocal(rows.to(total.dtype.element_ty) * T)
    return mean


@triton.jit
def _through_norm(grad, x, gain, m, rstd, mean_grad, mean_grad_hat):
    """Return the gradient of a norm's input x from that of its result; without means, the norm's
    statistics were constants; without gain, there is no norm."""
    if mean_grad is not None:
        grad = grad - mean_grad - (_wide(x) - m) * (mean_grad_hat * rstd)
    if gain is not None:
        grad = grad * gain
    return grad


@triton.jit(do_not_specialize=SIZES)
def norm_gradient(
    x, grad, gain, mean, rstd, sum_grad, sum_grad_hat, grad_x, rows, groups, steps,
    VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Compute the gradient of x, (rows, C), from that of the normalised x; without sums, mean and
    variance were constants."""
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    g = _load_row(gain, c, C)
    m = _load_row(mean, c, C)
    rs = _load_row(rstd, c, C)
    less = _mean(sum_grad, rows, 1, c, C)
    less_hat = _mean(sum_grad_hat, rows, 1, c, C)
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        through = _wide(tl.load(grad + here + at, mask=mask))
        value = tl.load(x + here + at, mask=mask)
        through = _through_norm(through, value, g, m, rs, less, less_hat)
        tl.store(grad_x + here + at, through.to(grad_x.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------ firing


@triton.jit
def _fires(above, AT_THRESHOLD: tl.constexpr):
    """Return which membranes fire, by their distance above the threshold."""
    if AT_THRESHOLD:
        fires = above >= 0
    else:
        fires = above > 0
    return fires


@triton.jit
def _in_thresholds(v, THRESHOLD: tl.constexpr):
    """Return v / THRESHOLD, rounded as in C++ and torch."""
    if THRESHOLD == 1:
        x = v
    elif v.dtype == tl.float64:
        x = v * (1 / THRESHOLD)
    else:
        x = tl.math.div_rn(v, tl.full(v.shape, THRESHOLD, v.dtype))
    return x


@triton.jit
def _number(v, THRESHOLD: tl.constexpr, MOST: tl.constexpr):
    """Return the number of spikes of membranes, up to MOST, with halves rounded to even."""
    x = _at_least_0(_in_thresholds(v, THRESHOLD))
    x = tl.minimum(x, MOST, propagate_nan=tl.PropagateNan.ALL)
    # Adding a number this large rounds the fraction away.
    large: tl.constexpr = 6755399441055744.0 if v.dtype == tl.float64 else 12582912.0
    return (x + large) - large


@triton.jit
def _decayed(u, a, DECAY: tl.constexpr):
    """Return the membrane after decay: 1 - a of it if a is learnt."""
    if a is None:
        left = u * DECAY
    else:
        left = u * (1.0 - a)
    return left


@triton.jit
def _membrane(u, current, a, DECAY: tl.constexpr, SCALES_INPUT: tl.constexpr):
    """Return the membrane before the reset, from the one after the last reset (None: at rest)."""
    if SCALES_INPUT:
        current = current * a
    if u is not None:
        current = _decayed(u, a, DECAY) + current
    return current


@triton.jit
def _after_reset(
    v, above, THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr,
    HARD: tl.constexpr
):
    """Return the membrane after the reset, from the membrane and its excess over the threshold."""
    if MOST is not None:
        u = v - _number(v, THRESHOLD, MOST) * THRESHOLD
    elif HARD:
        u = tl.where(_fires(above, AT_THRESHOLD), 0.0, v)
    else:
        u = tl.where(_fires(above, AT_THRESHOLD), above, v)
    return u


@triton.jit
def _normalized(value, g, o):
    """Return a loaded tile, times gain plus offset if they are given."""
    value = _wide(value)
    if g is not None:
        value = value * g + o
    return value


@triton.jit
def _currents(
    x, shortcut, start, g, o, g2, o2, here, plane, at, mask, T: tl.constexpr, PAST: tl.constexpr,
    SHARED: tl.constexpr
):
    """Return the currents of PAST earlier timesteps, from start or 0, and of T; and loaded inputs.
    """
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    currents = ()
    xs = ()
    added = ()
    for s in tl.static_range(PAST):
        if start is not None:
            earlier = _wide(tl.load(start + here + s * plane + at, mask=mask, other=0.0))
        else:
            earlier = tl.full(at.shape, 0.0, wide)
        currents = currents + (earlier,)  # noqa: RUF005  # Triton has no other way
    if SHARED:
        xs = (tl.load(x + here + at, mask=mask, other=0.0),)
        own = _normalized(xs[0], g, o)
    for t in tl.static_range(T):
        now = here + t * plane
        if not SHARED:
            value = tl.load(x + now + at, mask=mask, other=0.0)
            xs = xs + (value,)  # noqa: RUF005  # Triton has no other way
            own = _normalized(value, g, o)
        current = own
        if shortcut is not None:
            value = tl.load(shortcut + now + at, mask=mask, other=0.0)
            if g2 is not None:
                added = added + (value,)  # noqa: RUF005  # Triton has no other way
            current = own + _normalized(value, g2, o2)
        currents = currents + (current,)  # noqa: RUF005  # Triton has no other way
    return currents, xs, added


@triton.jit
def _sum_over_time(weights, biases, currents, t, S: tl.constexpr):
    """Return the bias at t plus the weighted sum of S currents; weights are (T, S)."""
    h = tl.full(currents[0].shape, 0.0, currents[0].dtype) + tl.load(biases + t)
    for s in tl.static_range(S):
        h += tl.load(weights + t * S + s) * currents[s]
    return h


@triton.jit(do_not_specialize=SIZES)
def fire(
    x, shortcut, identity, gain, offset, shortcut_gain, shortcut_offset, start, share, weights,
    biases, spikes, packed, end, rows, groups, steps, T: tl.constexpr, PAST: tl.constexpr,
    SHARED: tl.constexpr, HARD: tl.constexpr, DECAY: tl.constexpr, THRESHOLD: tl.constexpr,
    AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr, LEVELS: tl.constexpr,
    SCALES_INPUT: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Compute spikes plus identity, (T, N, C); the same in bytes; membranes, (1, N, C).

    x is (1, N, C) if all timesteps share it. Without start, neurons begin at rest; without gain and
    offset, x is the current. ``share``, if given, is learnt, and the decay is 1 - share. Neurons
    with weights, (T, PAST + T), and biases, (T,), have no membranes: start and end are the last
    currents, (PAST, N, C).
    """
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    plane = rows.to(tl.int64) * C
    a = _load(share)
    g = _load_row(gain, c, C)
    o = _load_row(offset, c, C)
    g2 = _load_row(shortcut_gain, c, C)
    o2 = _load_row(shortcut_offset, c, C)
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        u = None
        if weights is not None:
            currents, _, _ = _currents(
                x, shortcut, start, g, o, g2, o2, here, plane, at, mask, T, PAST, SHARED
            )
        else:
            if start is not None:
                u = _wide(tl.load(start + here + at, mask=mask))
            if SHARED:
                own = _normalized(tl.load(x + here + at, mask=mask), g, o)
        for t in tl.static_range(T):
            now = here + t * plane
            if weights is not None:
                v = _sum_over_time(weights, biases, currents, t, PAST + T)
            else:
                if not SHARED:
                    own = _normalized(tl.load(x + now + at, mask=mask), g, o)
                current = own
                if shortcut is not None:
                    added = tl.load(shortcut + now + at, mask=mask)
                    current = own + _normalized(added, g2, o2)
                v = _membrane(u, current, a, DECAY, SCALES_INPUT)
            above = v - THRESHOLD
            if MOST is not None:
                number = _number(v, THRESHOLD, MOST)
                out = number * (1 / LEVELS)
                byte = number.to(tl.int32).to(tl.uint8)
            else:
                fires = _fires(above, AT_THRESHOLD)
                out = tl.where(fires, 1.0, 0.0).to(v.dtype)
                byte = fires.to(tl.uint8)
            if identity is not None:
                out += _wide(tl.load(identity + now + at, mask=mask))
                byte = (out * LEVELS).to(tl.int32).to(tl.uint8)
            tl.store(spikes + now + at, out.to(spikes.dtype.element_ty), mask=mask)
            if packed is not None:
                tl.store(packed + now + at, byte, mask=mask)
            u = _after_reset(v, above, THRESHOLD, AT_THRESHOLD, MOST, HARD)
        if end is not None:
            if weights is not None:
                for s in tl.static_range(PAST):
                    tl.store(end + here + s * plane + at, currents[T + s], mask=mask)
            else:
                tl.store(end + here + at, u, mask=mask)


# ---------------------------------------------------------------------------------------- backward


@triton.jit
def _membranes(
    currents, start, a, here, at, mask, T: tl.constexpr, HARD: tl.constexpr, DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr,
    SCALES_INPUT: tl.constexpr
):
    """Recompute the membranes before the reset at each timestep, minus the threshold unless MOST is
    given. Nothing else is kept: a thread has 255 registers."""
    aboves = ()
    u = None
    if start is not None:
        u = _wide(tl.load(start + here + at, mask=mask, other=0.0))
    for t in tl.static_range(T):
        v = _membrane(u, currents[t], a, DECAY, SCALES_INPUT)
        above = v - THRESHOLD
        if MOST is not None:
            aboves = aboves + (v,)  # noqa: RUF005  # Triton has no other way
        else:
            aboves = aboves + (above,)  # noqa: RUF005  # Triton has no other way
        u = _after_reset(v, above, THRESHOLD, AT_THRESHOLD, MOST, HARD)
    return aboves


@triton.jit
def _slope(x, SURROGATE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the surrogate at ``x = u - V_th``; neurons.py has the formulas."""
    if SURROGATE == "triangle":
        slope = _at_least_0(WIDTH - tl.abs(x)) * (1 / (WIDTH * WIDTH))
    elif SURROGATE == "atan":
        y = x * (1.5707963267948966 * WIDTH)
        slope = _reciprocal(1.0 + y * y) * (WIDTH / 2)
    elif SURROGATE == "sigmoid":
        # sigma(y) (1 - sigma(y)) is even; exp of the negative argument does not overflow.
        e = tl.exp(tl.abs(x) * -WIDTH)
        r = _reciprocal(1.0 + e)
        slope = e * WIDTH * r * r
    else:
        tl.static_assert(SURROGATE == "rectangle")
        slope = (tl.abs(x) < WIDTH).to(x.dtype) * (1 / (2 * WIDTH))
    return slope


@triton.jit
def _gradient_of_membrane(
    above, grad_spikes, after, THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr,
    MOST: tl.constexpr, LEVELS: tl.constexpr, HARD: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the gradient of the membrane before the reset, hence of the current, from the spike's
    and that of the membrane after the reset (None: there is none)."""
    if MOST is not None:
        x = _in_thresholds(above, THRESHOLD)
        slope = ((x >= 0) & (x <= MOST)).to(above.dtype) * (1 / THRESHOLD)
        grad_spikes = grad_spikes * (1 / LEVELS)
    else:
        slope = _slope(above, SURROGATE, WIDTH)
    if after is None:
        grad = grad_spikes * slope
    else:
        if DETACH:
            grad = grad_spikes * slope
        elif HARD:
            grad = (grad_spikes - after * (above + THRESHOLD)) * slope
        else:
            grad = (grad_spikes - after * THRESHOLD) * slope
        if HARD:
            grad += tl.where(_fires(above, AT_THRESHOLD), 0.0, after)
        else:
            grad += after
    return grad


@triton.jit
def _store_sum(partial, x, number=0, numbers=1):
    """Store one of a program's sums of tiles, partial (programs, numbers)."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    # One after the other, the two reductions fail for a B200 in Triton 3.6 and 3.7.
    total = tl.reduce(x, None, _add)
    tl.store(partial + program * numbers + number, total)


@triton.jit
def _gradient_of_share(
    aboves, start, a, grad, here, at, mask, t: tl.constexpr, THRESHOLD: tl.constexpr,
    AT_THRESHOLD: tl.constexpr, HARD: tl.constexpr, SCALES_INPUT: tl.constexpr
):
    """Return the share's gradient from a membrane's at t, which is (1 - share) times the last
    membrane after its reset, plus the current, perhaps times share."""
    v = aboves[t] + THRESHOLD
    before = tl.full(v.shape, 0.0, v.dtype)
    if t > 0:
        earlier = aboves[t - 1]
        before = _after_reset(earlier + THRESHOLD, earlier, THRESHOLD, AT_THRESHOLD, None, HARD)
    elif start is not None:
        before = _wide(tl.load(start + here + at, mask=mask, other=0.0))
    if SCALES_INPUT:
        result = grad * ((v - before) * _reciprocal(a))
    else:
        result = -grad * before
    return result


@triton.jit
def _gradients_of_sums(
    weights, biases, currents, grad_spikes, here, plane, at, mask, T: tl.constexpr,
    PAST: tl.constexpr, ROWS: tl.constexpr, SURROGATE: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the gradients of the weighted sums at this program's ROWS timesteps, 0 beyond T."""
    grads = ()
    for k in tl.static_range(ROWS):
        t = tl.program_id(2) * ROWS + k
        is_there = mask & (tl.full(at.shape, t, tl.int32) < T)
        grad = _wide(tl.load(grad_spikes + here + t * plane + at, mask=is_there, other=0.0))
        h = _sum_over_time(weights, biases, currents, tl.minimum(t, T - 1), PAST + T)
        grads = grads + (grad * _slope(h, SURROGATE, WIDTH),)  # noqa: RUF005  # Triton has no other way
    return grads


@triton.jit
def _gradient_of_current(
    weights, grads, grad_end, s: tl.constexpr, here, plane, at, mask, T: tl.constexpr,
    PAST: tl.constexpr, ROWS: tl.constexpr
):
    """Return the gradient of one of PAST + T currents from those of the sums, and from its own if
    it is among the last currents, which the first program of its tiles adds."""
    total = tl.full(grads[0].shape, 0.0, grads[0].dtype)
    if PAST + T > 8:
        # The assembler would load all of that many weights in advance, and registers spill.
        tl.debug_barrier()
    if grad_end is not None and s >= T:  # noqa: SIM102  # only this one is a constant
        if tl.program_id(2) == 0:
            total += _wide(tl.load(grad_end + here + (s - T) * plane + at, mask=mask, other=0.0))
    for k in tl.static_range(ROWS):
        t = tl.minimum(tl.program_id(2) * ROWS + k, T - 1)
        total = tl.fma(grads[k], tl.load(weights + t * (PAST + T) + s), total)
    return total


@triton.jit
def _added(totals, x, LOCAL: tl.constexpr):
    """Return totals with a tile added, LOCAL neighbours, which a thread has, in one."""
    parts = tl.reshape(x, [x.shape[0], x.shape[1] // LOCAL, LOCAL])
    return totals + tl.reduce(parts, 2, _add)


@triton.jit(do_not_specialize=SIZES)
def backward_sums(
    x, shortcut, gain, offset, mean, shortcut_gain, shortcut_offset, shortcut_mean, start, share,
    weights, biases, grad_spikes, grad_end, partial, partial_learned, rows, groups, steps,
    T: tl.constexpr, PAST: tl.constexpr, ROWS: tl.constexpr, LOCAL: tl.constexpr,
    SHARED: tl.constexpr, HARD: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr,
    DECAY: tl.constexpr, THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr,
    LEVELS: tl.constexpr, SCALES_INPUT: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr
):
    """Sum a program's rows of the current's gradient, and of its product with each normalised input
    less its mean. partial is (blocks, 2, C), or with a normalised shortcut (blocks, 3, C); without
    gain, x is the current, and there are no such sums. Also sum the gradients of the learnt values,
    partial_learned (programs, numbers). Those of weights are ROWS a program, for the registers."""
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    plane = rows.to(tl.int64) * C
    a = _load(share)
    g = _load_row(gain, c, C)
    o = _load_row(offset, c, C)
    m = _load_row(mean, c, C)
    g2 = _load_row(shortcut_gain, c, C)
    o2 = _load_row(shortcut_offset, c, C)
    m2 = _load_row(shortcut_mean, c, C)
    total = tl.full([BN, BC], 0.0, wide)
    with_x = total
    with_shortcut = None if shortcut_gain is None else total
    with_share = total
    S: tl.constexpr = PAST + T
    of_weights = ()
    if weights is not None:
        for _ in tl.static_range(ROWS * (S + 1)):
            zeros = tl.full([BN, BC // LOCAL], 0.0, wide)
            of_weights = of_weights + (zeros,)  # noqa: RUF005  # Triton has no other way
    for i in range(steps):
        # Masked values are 0, and so are their gradients.
        here, mask = _tile(i, steps, rows, r, c, C)
        currents, xs, added = _currents(
            x, shortcut, start, g, o, g2, o2, here, plane, at, mask, T, PAST, SHARED
        )
        if weights is not None:
            grads = _gradients_of_sums(
                weights, biases, currents, grad_spikes, here, plane, at, mask, T, PAST, ROWS,
                SURROGATE, WIDTH
            )
            before = of_weights
            of_weights = ()
            for k in tl.static_range(ROWS):
                for s in tl.static_range(S):
                    sums = _added(before[k * (S + 1) + s], grads[k] * currents[s], LOCAL)
                    of_weights = of_weights + (sums,)  # noqa: RUF005  # Triton has no other way
                sums = _added(before[k * (S + 1) + S], grads[k], LOCAL)
                of_weights = of_weights + (sums,)  # noqa: RUF005  # Triton has no other way
        else:
            aboves = _membranes(
                currents, start, a, here, at, mask, T, HARD, DECAY, THRESHOLD, AT_THRESHOLD, MOST,
                SCALES_INPUT
            )
        if gain is not None:
            after = None
            if grad_end is not None and weights is None:
                after = tl.load(grad_end + here + at, mask=mask, other=0.0).to(wide)
            over_time = tl.full([BN, BC], 0.0, wide)
            for t in tl.static_range(T - 1, -1, -1):
                if weights is not None:
                    grad = _gradient_of_current(
                        weights, grads, grad_end, PAST + t, here, plane, at, mask, T, PAST, ROWS
                    )
                else:
                    grad = tl.load(grad_spikes + here + t * plane + at, mask=mask, other=0.0)
                    grad = _gradient_of_membrane(
                        aboves[t], grad.to(wide), after, THRESHOLD, AT_THRESHOLD, MOST, LEVELS,
                        HARD, DETACH, SURROGATE, WIDTH
                    )
                    after = _decayed(grad, a, DECAY)
                    if share is not None:
                        with_share += _gradient_of_share(
                            aboves, start, a, grad, here, at, mask, t, THRESHOLD, AT_THRESHOLD,
                            HARD, SCALES_INPUT
                        )
                if SCALES_INPUT:
                    grad = grad * a
                over_time += grad
                if not SHARED:
                    with_x += grad * (xs[t].to(wide) - m)
                if shortcut_gain is not None:
                    with_shortcut += grad * (added[t].to(wide) - m2)
            total += over_time
            if SHARED:
                with_x += over_time * (xs[0].to(wide) - m)
    if gain is not None:
        block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        _store_rows(partial, block, c, C, total, with_x, with_shortcut)
    if share is not None:
        _store_sum(partial_learned, with_share)
    if weights is not None:
        for k in tl.static_range(ROWS):
            t = tl.program_id(2) * ROWS + k
            if t < T:
                for s in tl.static_range(S):
                    _store_sum(partial_learned, of_weights[k * (S + 1) + s], t * S + s, T * (S + 1))
                _store_sum(partial_learned, of_weights[k * (S + 1) + S], T * S + t, T * (S + 1))


@triton.jit(do_not_specialize=SIZES)
def finish_sums(
    partial, rstd, shortcut_rstd, sums, blocks, groups, VEC: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr
):
    """Add the sums of `backward_sums` up, in float64; each program those of a kind and 8 channels.

    sums is (2, 2, C), or with a normalised shortcut (2, 3, C): twice the sums of the gradient, and
    of its products with the normalised current and shortcut, before gain and offset. Without rstd
    it is (2, 1, C).
    """
    C, c = _channels(groups, VEC, BC)
    p = tl.arange(0, BP)
    k, number = tl.program_id(0), tl.num_programs(0)
    wide = sums.dtype.element_ty
    total = tl.full([BP, BC], 0.0, tl.float64)
    for i in range(0, blocks, BP):
        mask = (i + p < blocks)[:, None] & (c < C)[None, :]
        at = ((i + p) * number + k)[:, None] * C + c[None, :]
        total += tl.load(partial + at, mask=mask, other=0.0).to(tl.float64)
    one = tl.reduce(total, 0, _add)
    if rstd is not None:  # noqa: SIM102  # only that is known to the compiler
        if k == 1:
            one *= tl.load(rstd + c, mask=c < C, other=0.0).to(tl.float64)
    if shortcut_rstd is not None:  # noqa: SIM102  # only that is known to the compiler
        if k == 2:
            one *= tl.load(shortcut_rstd + c, mask=c < C, other=0.0).to(tl.float64)
    tl.store(sums + k * C + c, one.to(wide), mask=c < C)
    tl.store(sums + (number + k) * C + c, one.to(wide), mask=c < C)


@triton.jit(do_not_specialize=SIZES)
def backward(
    x, shortcut, gain, offset, mean, rstd, shortcut_gain, shortcut_offset, shortcut_mean,
    shortcut_rstd, start, share, weights, biases, grad_spikes, grad_end, sum_grad, sum_grad_hat,
    shortcut_sum_grad, shortcut_sum_grad_hat, grad_x, grad_shortcut, grad_start, partial_learned,
    rows, groups, steps, T: tl.constexpr, PAST: tl.constexpr, SHARED: tl.constexpr,
    HARD: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, DECAY: tl.constexpr,
    THRESHOLD: tl.constexpr, AT_THRESHOLD: tl.constexpr, MOST: tl.constexpr, LEVELS: tl.constexpr,
    SCALES_INPUT: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr
):
    """Compute the gradients of x, (T or 1, N, C), shortcut, (T, N, C), and start, if any.

    Without sums, means and variances were constants. Without gain, x is the current, and the
    share's gradient is summed, too: partial_learned (programs, 1).
    """
    C, c, r, at = _numbers(groups, VEC, BN, BC)
    plane = rows.to(tl.int64) * C
    a = _load(share)
    g = _load_row(gain, c, C)
    o = _load_row(offset, c, C)
    g2 = _load_row(shortcut_gain, c, C)
    o2 = _load_row(shortcut_offset, c, C)
    m = _load_row(mean, c, C)
    m2 = _load_row(shortcut_mean, c, C)
    rs = _load_row(rstd, c, C)
    rs2 = _load_row(shortcut_rstd, c, C)
    less = _mean(sum_grad, rows, 1 if SHARED else T, c, C)
    less_hat = _mean(sum_grad_hat, rows, 1 if SHARED else T, c, C)
    less2 = _mean(shortcut_sum_grad, rows, T, c, C)
    less2_hat = _mean(shortcut_sum_grad_hat, rows, T, c, C)
    if partial_learned is not None:
        with_share = tl.full([BN, BC], 0.0, share.dtype.element_ty)
    for i in range(steps):
        here, mask = _tile(i, steps, rows, r, c, C)
        currents, xs, added = _currents(
            x, shortcut, start, g, o, g2, o2, here, plane, at, mask, T, PAST, SHARED
        )
        after = None
        if weights is not None:
            grads = _gradients_of_sums(
                weights, biases, currents, grad_spikes, here, plane, at, mask, T, PAST, T,
                SURROGATE, WIDTH
            )
        else:
            aboves = _membranes(
                currents, start, a, here, at, mask, T, HARD, DECAY, THRESHOLD, AT_THRESHOLD, MOST,
                SCALES_INPUT
            )
            if grad_end is not None:
                after = _wide(tl.load(grad_end + here + at, mask=mask, other=0.0))
        over_time = tl.full([BN, BC], 0.0, currents[0].dtype)
        for t in tl.static_range(T - 1, -1, -1):
            now = here + t * plane
            if weights is not None:
                grad = _gradient_of_current(
                    weights, grads, grad_end, PAST + t, here, plane, at, mask, T, PAST, T
                )
            else:
                grad = _wide(tl.load(grad_spikes + now + at, mask=mask, other=0.0))
                grad = _gradient_of_membrane(
                    aboves[t], grad, after, THRESHOLD, AT_THRESHOLD, MOST, LEVELS, HARD, DETACH,
                    SURROGATE, WIDTH
                )
                after = _decayed(grad, a, DECAY)
                if partial_learned is not None:
                    with_share += _gradient_of_share(
                        aboves, start, a, grad, here, at, mask, t, THRESHOLD, AT_THRESHOLD, HARD,
                        SCALES_INPUT
                    )
            if SCALES_INPUT:
                grad = grad * a
            if SHARED:
                over_time += grad
            elif grad_x is not None:
                through = _through_norm(grad, xs[t], g, m, rs, less, less_hat)
                tl.store(grad_x + now + at, through.to(grad_x.dtype.element_ty), mask=mask)
            if grad_shortcut is not None:
                through = grad
                if shortcut_gain is not None:
                    through = _through_norm(grad, added[t], g2, m2, rs2, less2, less2_hat)
                kind = grad_shortcut.dtype.element_ty
                tl.store(grad_shortcut + now + at, through.to(kind), mask=mask)
        if SHARED and grad_x is not None:
            through = _through_norm(over_time, xs[0], g, m, rs, less, less_hat)
            tl.store(grad_x + here + at, through.to(grad_x.dtype.element_ty), mask=mask)
        if grad_start is not None and weights is None:
            tl.store(grad_start + here + at, after.to(grad_start.dtype.element_ty), mask=mask)
        elif grad_start is not None:
            for s in tl.static_range(PAST):
                grad = _gradient_of_current(
                    weights, grads, grad_end, s, here, plane, at, mask, T, PAST, T
                )
                tl.store(grad_start + here + s * plane + at, grad, mask=mask)
    if partial_learned is not None:
        _store_sum(partial_learned, with_share)
