"""Max-pooling on a GPU, in Triton: of spikes in bytes, and of a normalised current. pool.cpp is the
same on a CPU. Images are contiguous (N, H, W, C). For each output a byte stores its position in the
window (of equal maxima the first, as in torch), so the backward pass needs nothing else. A program
processes `BN` pixels of `BC` channels; neuron.py explains ``groups`` and capitals.
"""

import triton
import triton.language as tl

from tetdist.nn.fast.kernels import neuron

# A kernel has many arguments, and a line for each would hide what it does.
# fmt: off

SIZES = ["pixels", "groups", "height", "width", "out_height", "out_width"]


@triton.jit
def _at(pixel, C, c):
    # Pixel indices have 32 bits, which a GPU divides without a call; offsets need 64.
    return pixel.to(tl.int64)[:, None] * C + c[None, :]


@triton.jit
def _place(pixels, groups, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr):
    """Return C; the channels and pixels of this program; its numbers' offsets, and which exist."""
    C, c = neuron._channels(groups, VEC, BC)
    pixel = tl.program_id(0) * BN + tl.arange(0, BN)
    return C, c, pixel, _at(pixel, C, c), (pixel < pixels)[:, None] & (c < C)[None, :]


@triton.jit
def _largest(
    images, g, o, pixel, mask, C, c, height, width, out_height, out_width, KERNEL: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr
):
    """Return each window's largest byte, or g * x + o if they are given, and its position there."""
    row = pixel // out_width
    left = pixel % out_width * STRIDE - PADDING
    top = row % out_height * STRIDE - PADDING
    image = row // out_height
    most = tl.full(mask.shape, -1, tl.int32 if g is None else g.dtype)
    position = tl.full(mask.shape, -1, tl.int32)
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            y = top + dy
            x = left + dx
            here = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            here = mask & here[:, None]
            at = _at((image * height + y) * width + x, C, c)
            value = tl.load(images + at, mask=here, other=0)
            if g is None:
                value = value.to(tl.int32)
                larger = here & (value > most)
            else:
                value = value.to(g.dtype) * g + o
                # Take a window's first pixel in any case: comparisons with NaN are false.
                larger = here & ((position < 0) | (value > most))
            most = tl.where(larger, value, most)
            position = tl.where(larger, dy * KERNEL + dx, position)
    return most, position.to(tl.uint8)


@triton.jit(do_not_specialize=SIZES)
def forward(
    images, out, packed, where, pixels, groups, height, width, out_height, out_width,
    LEVELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Compute each window's largest byte, as a number and as a byte, and its position there."""
    C, c, pixel, at, mask = _place(pixels, groups, VEC, BN, BC)
    most, position = _largest(
        images, None, None, pixel, mask, C, c, height, width, out_height, out_width, KERNEL, STRIDE,
        PADDING
    )
    kind = out.dtype.element_ty
    wide = tl.float64 if kind == tl.float64 else tl.float32
    tl.store(out + at, (most.to(wide) * (1 / LEVELS)).to(kind), mask=mask)
    tl.store(packed + at, most.to(tl.uint8), mask=mask)
    tl.store(where + at, position, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def forward_normalized(
    images, gain, offset, out, where, pixels, groups, height, width, out_height, out_width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, VEC: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr
):
    """Do the same for gain * x + offset, per channel, without storing that."""
    C, c, pixel, at, mask = _place(pixels, groups, VEC, BN, BC)
    most, position = _largest(
        images, neuron._load_row(gain, c, C), neuron._load_row(offset, c, C), pixel, mask, C, c,
        height, width, out_height, out_width, KERNEL, STRIDE, PADDING
    )
    tl.store(out + at, most.to(out.dtype.element_ty), mask=mask)
    tl.store(where + at, position, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward(
    grad_out, where, images, gain, mean, rstd, sum_grad, sum_grad_hat, grad_in, pixels, groups,
    height, width, out_height, out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Compute the gradient of each pixel, or of the current before its norm, if there is gain: the
    sum over the windows whose maximum it is. Without sums, mean and variance were constants."""
    C, c, pixel, at, mask = _place(pixels, groups, VEC, BN, BC)
    kind = grad_in.dtype.element_ty
    wide = tl.float64 if kind == tl.float64 else tl.float32
    row = pixel // width
    x = pixel % width + PADDING
    y = row % height + PADDING
    image = row // height
    total = tl.full([BN, BC], 0.0, wide)
    # The last window with a pixel begins at the multiple of the stride before it; at most this many
    # windows contain it. They are added in the order of the outputs, as in torch.
    WINDOWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    for back_y in tl.static_range(WINDOWS - 1, -1, -1):
        for back_x in tl.static_range(WINDOWS - 1, -1, -1):
            window_y = y // STRIDE - back_y
            window_x = x // STRIDE - back_x
            dy = y - window_y * STRIDE
            dx = x - window_x * STRIDE
            here = (window_y >= 0) & (window_y < out_height) & (dy < KERNEL)
            here = here & (window_x >= 0) & (window_x < out_width) & (dx < KERNEL)
            here = mask & here[:, None]
            there = _at((image * out_height + window_y) * out_width + window_x, C, c)
            origin = tl.load(where + there, mask=here, other=255).to(tl.int32)
            grad = tl.load(grad_out + there, mask=here, other=0.0).to(wide)
            total += tl.where(origin == (dy * KERNEL + dx)[:, None], grad, 0.0)
    if gain is not None:
        total = neuron._through_norm(
            total, tl.load(images + at, mask=mask, other=0.0), neuron._load_row(gain, c, C),
            neuron._load_row(mean, c, C), neuron._load_row(rstd, c, C),
            neuron._mean(sum_grad, pixels, 1, c, C), neuron._mean(sum_grad_hat, pixels, 1, c, C)
        )
    tl.store(grad_in + at, total.to(kind), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, "steps"])
def backward_sums(
    grad_out, where, images, mean, partial, pixels, steps, groups, height, width, out_height,
    out_width, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    VEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """Sum a program's gradients of windows, and their products with the maximum's current less its
    mean: each gradient is that of one pixel. partial is (programs, 2, C)."""
    C, c = neuron._channels(groups, VEC, BC)
    wide = mean.dtype.element_ty
    m = neuron._load_row(mean, c, C)
    total = tl.full([BN, BC], 0.0, wide)
    with_x = total
    for i in range(steps):
        pixel = (tl.program_id(0) * steps + i) * BN + tl.arange(0, BN)
        mask = (pixel < pixels)[:, None] & (c < C)[None, :]
        at = _at(pixel, C, c)
        origin = tl.load(where + at, mask=mask, other=0).to(tl.int32)
        grad = tl.load(grad_out + at, mask=mask, other=0.0).to(wide)
        row = pixel // out_width
        y = (row % out_height * STRIDE - PADDING)[:, None] + origin // KERNEL
        x = (pixel % out_width * STRIDE - PADDING)[:, None] + origin % KERNEL
        there = ((row // out_height * height)[:, None] + y) * width + x
        value = tl.load(images + there.to(tl.int64) * C + c[None, :], mask=mask, other=0.0).to(wide)
        total += grad
        with_x += grad * (value - m)
    neuron._store_rows(partial, tl.program_id(0), c, C, total, with_x, None)
