// Neurons on a CPU: the passes of fused.py, each of which goes through memory once.
//
// native.py compiles this file for one kind of neuron:
//
//     SURROGATE        0 triangle, 1 atan, 2 sigmoid, 3 rectangle (neurons.py has their formulas)
//     HARD_RESET       1 hard, 0 soft
//     DETACH_RESET     whether the reset is a constant to the backward pass
//     FIRES_AT_THRESHOLD    whether a membrane at the threshold fires
//
// Tensors are (T, N, C) without gaps: N = B*H*W, channels last. Where nothing is normalised they are
// any numbers, one beside the other. "Wide" is the type in which one computes: float, and double for
// double. A sum over rows is made of sums over blocks of rows, whose
// size does not depend on the number of threads; so neither does any result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "types.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// glibc's vector versions, which it declares to compilers with -ffast-math alone.
extern "C" {
__attribute__((simd("notinbranch"))) float expf(float);
__attribute__((simd("notinbranch"))) double exp(double);
}
#endif

namespace {

// Channels that are worked on at a time, so that T membranes of each stay in the first-level cache.
constexpr int CHANNELS = 64;

struct Neuron {
    double decay, threshold, width;
};

// Whether a membrane fires that is so much above the threshold.
template <class W> inline bool does_fire(W above) {
    return FIRES_AT_THRESHOLD ? above >= 0 : above > 0;
}

template <class W> inline W slope(W x, W width) {
#if SURROGATE == 0
    return std::max(width - std::abs(x), W(0)) / (width * width);
#elif SURROGATE == 1
    W y = W(M_PI / 2) * width * x;
    return width / 2 / (1 + y * y);
#elif SURROGATE == 2
    W s = 1 / (1 + (std::is_same_v<W, float> ? W(expf(float(-width * x))) : W(exp(double(-width * x)))));
    return width * s * (1 - s);
#else
    return (std::abs(x) < width ? W(1) : W(0)) / (2 * width);
#endif
}

// Runs body(channel, length) over all channels of a row, with a length known to the compiler where
// it is CHANNELS.
template <class Body> inline void over_channels(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + CHANNELS <= channels; c += CHANNELS)
        body(c, std::integral_constant<int, CHANNELS>());
    if (c < channels) body(c, int(channels - c));
}

// The same of the group of CHANNELS that begins at a channel.
template <class Body> inline void of_group(int64_t channels, int64_t c, Body body) {
    if (c + CHANNELS <= channels) body(c, std::integral_constant<int, CHANNELS>());
    else body(c, int(channels - c));
}

// --------------------------------------------------------------------------------------- forward

template <class X> struct Forward {
    using W = Wide<X>;
    const X* x;         // (T or 1, N, C)
    const X* shortcut;  // (T, N, C) or null
    const W *gain, *offset;                    // null: x is the current
    const W *shortcut_gain, *shortcut_offset;  // null: the shortcut is added as it is
    const W* start;     // membranes, (N, C), or null
    const X* identity;  // (T, N, C) or null
    X* spikes;          // (T, N, C)
    uint8_t* packed;    // likewise, or null
    W* end;             // membranes, (N, C), or null
    int64_t timesteps, rows, channels, shared;
    Neuron neuron;
};

// What is added to the normalised current; ALONE: nothing, and it is not normalised.
enum Shortcut { ALONE, NONE, PLAIN, NORMALIZED };

template <Shortcut SHORTCUT, bool IDENTITY, class X, class Length>
inline void forward_part(const Forward<X>& f, int64_t n, int64_t c0, Length length) {
    using W = Wide<X>;
    const W decay(f.neuron.decay), threshold(f.neuron.threshold);
    const int64_t at = n * f.channels + c0, plane = f.rows * f.channels;
    const W *gain = f.gain + c0, *offset = f.offset + c0;
    const W *gain2 = f.shortcut_gain + c0, *offset2 = f.shortcut_offset + c0;
    W u[CHANNELS];
    for (int c = 0; c < length; c++) u[c] = f.start ? f.start[at + c] : W(0);
    for (int64_t t = 0; t < f.timesteps; t++) {
        const int64_t now = t * plane + at;
        const X* x = f.x + (f.shared ? at : now);
        const X *shortcut = f.shortcut + now, *identity = f.identity + now;
        X* spikes = f.spikes + now;
        W out[CHANNELS];
#pragma omp simd
        for (int c = 0; c < length; c++) {
            W current = wide(x[c]);
            if (SHORTCUT != ALONE) current = current * gain[c] + offset[c];
            if (SHORTCUT == PLAIN) current += wide(shortcut[c]);
            if (SHORTCUT == NORMALIZED) current += wide(shortcut[c]) * gain2[c] + offset2[c];
            W v = decay * u[c] + current;
            const bool fires = does_fire(v - threshold);
            out[c] = fires ? W(1) : W(0);
            if (IDENTITY) out[c] += wide(identity[c]);
            spikes[c] = narrow<X>(out[c]);
            u[c] = fires ? (HARD_RESET ? W(0) : v - threshold) : v;
        }
        if (f.packed) {
            uint8_t* packed = f.packed + now;
#pragma omp simd
            for (int c = 0; c < length; c++) packed[c] = uint8_t(int32_t(out[c]));
        }
    }
    if (f.end)
        for (int c = 0; c < length; c++) f.end[at + c] = u[c];
}

template <Shortcut SHORTCUT, bool IDENTITY, class X>
void forward_rows(const Forward<X>& f, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < f.rows; n++)
        over_channels(f.channels, [&](int64_t c, auto length) {
            forward_part<SHORTCUT, IDENTITY>(f, n, c, length);
        });
}

template <Shortcut SHORTCUT, class X> void forward_with(const Forward<X>& f, int threads) {
    if (f.identity) forward_rows<SHORTCUT, true>(f, threads);
    else forward_rows<SHORTCUT, false>(f, threads);
}

template <class X> void forward_alone(const Forward<X>& f, int threads) {
    Forward<X> row = f;
    row.channels = f.rows * f.channels;
    row.rows = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < row.channels; first += CHANNELS)
        of_group(row.channels, first, [&](int64_t c, auto length) {
            forward_part<ALONE, false>(row, 0, c, length);
        });
}

template <class X> void forward(const Forward<X>& f, int threads) {
    if (!f.gain) forward_alone(f, threads);
    else if (!f.shortcut) forward_with<NONE>(f, threads);
    else if (!f.shortcut_gain) forward_with<PLAIN>(f, threads);
    else forward_with<NORMALIZED>(f, threads);
}

// -------------------------------------------------------------------------------------- backward

template <class X> struct Backward {
    using W = Wide<X>;
    const X* x;         // (T or 1, N, C)
    const X* shortcut;  // (T, N, C) or null
    const W *gain, *offset, *mean, *rstd;  // or all null: x is the current
    const W *shortcut_gain, *shortcut_offset, *shortcut_mean, *shortcut_rstd;  // or all null
    const W* start;        // membranes, (N, C), or null
    const X* grad_spikes;  // (T, N, C)
    const W* grad_end;     // (N, C) or null
    X* total;              // gradient of the current, (T, N, C), or null
    X* own;                // its sum over time, (N, C), where all timesteps share x; or null
    W *sum_grad, *sum_grad_xhat, *sum_grad_shortcut_hat;  // (C,); the last, or all, may be null
    W* grad_start;                                        // (N, C) or null
    W* partial;                                           // (blocks, 3, C)
    int64_t timesteps, rows, channels, shared;
    Neuron neuron;
};

template <Shortcut SHORTCUT, class X, class Length>
inline void backward_part(const Backward<X>& b, int64_t n, int64_t c0, Length length, Wide<X>* us,
                          Wide<X>* sum, Wide<X>* sum_x, Wide<X>* sum_shortcut) {
    using W = Wide<X>;
    const W decay(b.neuron.decay), threshold(b.neuron.threshold), width(b.neuron.width);
    const int64_t at = n * b.channels + c0, plane = b.rows * b.channels;
    const W *gain = b.gain + c0, *offset = b.offset + c0, *mean = b.mean + c0;
    const W *gain2 = b.shortcut_gain + c0, *offset2 = b.shortcut_offset + c0;
    const W* mean2 = b.shortcut_mean + c0;
    W u[CHANNELS], after[CHANNELS], over_time[CHANNELS], with_x[CHANNELS], with_shortcut[CHANNELS];
    for (int c = 0; c < length; c++) u[c] = b.start ? b.start[at + c] : W(0);
    for (int64_t t = 0; t < b.timesteps; t++) {  // the membranes again
        const X *x = b.x + (b.shared ? at : t * plane + at), *shortcut = b.shortcut + t * plane + at;
        W* before_reset = us + t * CHANNELS;
#pragma omp simd
        for (int c = 0; c < length; c++) {
            W current = wide(x[c]);
            if (SHORTCUT != ALONE) current = current * gain[c] + offset[c];
            if (SHORTCUT == PLAIN) current += wide(shortcut[c]);
            if (SHORTCUT == NORMALIZED) current += wide(shortcut[c]) * gain2[c] + offset2[c];
            const W v = decay * u[c] + current;
            before_reset[c] = v;
            u[c] = does_fire(v - threshold) ? (HARD_RESET ? W(0) : v - threshold) : v;
        }
    }
    for (int c = 0; c < length; c++) {
        after[c] = b.grad_end ? b.grad_end[at + c] : W(0);
        over_time[c] = with_x[c] = with_shortcut[c] = 0;
    }
    for (int64_t t = b.timesteps - 1; t >= 0; t--) {
        const int64_t now = t * plane + at;
        const X *x = b.x + (b.shared ? at : now), *grad_spikes = b.grad_spikes + now;
        const X* shortcut = b.shortcut + now;
        const W* before_reset = us + t * CHANNELS;
        W grad[CHANNELS];
#pragma omp simd
        for (int c = 0; c < length; c++) {
            const W v = before_reset[c];
            const bool fires = does_fire(v - threshold);
            const W kept = HARD_RESET && fires ? W(0) : after[c];
            const W through_reset = DETACH_RESET ? W(0) : after[c] * (HARD_RESET ? v : threshold);
            const W g = (wide(grad_spikes[c]) - through_reset) * slope(v - threshold, width) + kept;
            grad[c] = g;
            over_time[c] += g;
            if (SHORTCUT != ALONE) with_x[c] += g * (wide(x[c]) - mean[c]);
            if (SHORTCUT == NORMALIZED) with_shortcut[c] += g * (wide(shortcut[c]) - mean2[c]);
            after[c] = decay * g;  // the gradient of the membrane that was there before
        }
        if (b.total) {
            X* total = b.total + now;
#pragma omp simd
            for (int c = 0; c < length; c++) total[c] = narrow<X>(grad[c]);
        }
    }
    if (SHORTCUT != ALONE) {
#pragma omp simd
        for (int c = 0; c < length; c++) {
            sum[c0 + c] += over_time[c];
            sum_x[c0 + c] += with_x[c];
            if (SHORTCUT == NORMALIZED) sum_shortcut[c0 + c] += with_shortcut[c];
        }
    }
    if (b.own)
        for (int c = 0; c < length; c++) b.own[at + c] = narrow<X>(over_time[c]);
    if (b.grad_start)
        for (int c = 0; c < length; c++) b.grad_start[at + c] = after[c];
}

template <Shortcut SHORTCUT, class X> void backward_rows(const Backward<X>& b, int threads) {
    using W = Wide<X>;
    const int64_t step = rows_of_block(b.channels), blocks = (b.rows + step - 1) / step;
#pragma omp parallel num_threads(threads)
    {
        std::vector<W> us(b.timesteps * CHANNELS);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            W *sum = b.partial + 3 * block * b.channels, *sum_x = sum + b.channels;
            W* sum_shortcut = sum_x + b.channels;
            std::fill(sum, sum + 3 * b.channels, W(0));
            for (int64_t n = block * step; n < std::min(b.rows, (block + 1) * step); n++)
                over_channels(b.channels, [&](int64_t c, auto length) {
                    backward_part<SHORTCUT>(b, n, c, length, us.data(), sum, sum_x, sum_shortcut);
                });
        }
    }
    for (int64_t c = 0; c < b.channels; c++) {
        double sums[3] = {0, 0, 0};
        for (int64_t block = 0; block < blocks; block++)
            for (int i = 0; i < 3; i++) sums[i] += b.partial[(3 * block + i) * b.channels + c];
        b.sum_grad[c] = W(sums[0]);
        b.sum_grad_xhat[c] = W(sums[1] * b.rstd[c]);
        if (SHORTCUT == NORMALIZED)
            b.sum_grad_shortcut_hat[c] = W(sums[2] * b.shortcut_rstd[c]);
    }
}

template <class X> void backward_alone(const Backward<X>& b, int threads) {
    using W = Wide<X>;
    Backward<X> row = b;
    row.channels = b.rows * b.channels;
    row.rows = 1;
#pragma omp parallel num_threads(threads)
    {
        std::vector<W> us(b.timesteps * CHANNELS);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < row.channels; first += CHANNELS)
            of_group(row.channels, first, [&](int64_t c, auto length) {
                W* none = nullptr;
                backward_part<ALONE>(row, 0, c, length, us.data(), none, none, none);
            });
    }
}

template <class X> void backward(const Backward<X>& b, int threads) {
    if (!b.gain) backward_alone(b, threads);
    else if (!b.shortcut) backward_rows<NONE>(b, threads);
    else if (!b.shortcut_gain) backward_rows<PLAIN>(b, threads);
    else backward_rows<NORMALIZED>(b, threads);
}

}  // namespace

extern "C" {

#define PASSES(X, NAME)                                                                            \
    void forward_##NAME(const Forward<X>* f, int threads) { forward<X>(*f, threads); }             \
    void backward_##NAME(const Backward<X>* b, int threads) { backward<X>(*b, threads); }

PASSES(float, float32)
PASSES(double, float64)
PASSES(bf16, bfloat16)
}
