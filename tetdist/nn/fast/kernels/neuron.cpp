// Neurons on a CPU: the kernels of fused.py, each with one pass over memory.
//
// native.py compiles this file for one kind of neuron:
//
//     SURROGATE        0 triangle, 1 atan, 2 sigmoid, 3 rectangle (neurons.py has their formulas)
//     HARD_RESET       1 hard, 0 soft
//     DETACH_RESET     whether the reset is a constant in the backward pass
//     FIRES_AT_THRESHOLD    whether a membrane at the threshold fires
//     COUNTS           whether it fires once per threshold in the membrane, up to a maximum (I-LIF)
//     LEARNS_DECAY     whether the decay, 1 - share, gets a gradient (PLIF)
//     SCALES_INPUT     whether the current is multiplied by the share
//     PARALLEL         whether it has no membrane, but weights of the currents of all timesteps (PSN)
//
// Tensors are contiguous (T, N, C): N = B*H*W, channels last; without normalisation, just contiguous
// numbers. "Wide" is the compute type: float, or double for double. A sum over rows adds up sums over
// blocks of rows, whose size does not depend on the number of threads; so results do not, either.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "types.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// glibc's vector versions, which it declares only for -ffast-math.
extern "C" {
__attribute__((simd("notinbranch"))) float expf(float);
__attribute__((simd("notinbranch"))) double exp(double);
}
#endif

namespace {

// Channels that are processed at a time, so that their T membranes stay in the first-level cache.
constexpr int CHANNELS = 64;

struct Neuron {
    double decay, threshold, width;
    double share;           // 1 - decay
    double most, levels;    // maximum number of spikes in a timestep, and their divisor when sent
    const double* weights;  // weights (T, PAST + T), then the offsets of the sums, (T,)
    int64_t past;           // PAST, the number of currents before a segment that the sums include
};

// Returns the number of learnt values of the neurons.
inline int64_t num_learned(const Neuron& neuron, int64_t timesteps) {
    return PARALLEL ? timesteps * (neuron.past + timesteps + 1) : LEARNS_DECAY ? 1 : 0;
}

#if PARALLEL
// Copies the currents before a segment, (PAST, CHANNELS); 0 without a start.
template <class W, class Length>
inline void copy_past(const Neuron& neuron, const W* start, int64_t plane, W* currents,
                      Length length) {
    for (int64_t s = 0; s < neuron.past; s++)
        for (int c = 0; c < length; c++)
            currents[s * CHANNELS + c] = start ? start[s * plane + c] : W(0);
}

// Computes the weighted sums over time of the currents (PAST + T, CHANNELS) at a timestep.
template <class W, class Length>
inline void sum_over_time(const Neuron& neuron, int64_t timesteps, int64_t t, const W* currents,
                          W* h, Length length) {
    const int64_t number = neuron.past + timesteps;
    const double* weights = neuron.weights + t * number;
    const W bias(neuron.weights[timesteps * number + t]);
    for (int c = 0; c < length; c++) h[c] = bias;
    for (int64_t s = 0; s < number; s++) {
        const W weight(weights[s]);
        const W* current = currents + s * CHANNELS;
#pragma omp simd
        for (int c = 0; c < length; c++) h[c] += weight * current[c];
    }
}
#endif

// Whether a membrane fires, by its distance above the threshold.
template <class W> inline bool does_fire(W above) {
    return FIRES_AT_THRESHOLD ? above >= 0 : above > 0;
}

// The number of spikes of a membrane before its reset.
template <class W> inline W spikes_of(W v, W threshold, W most) {
#if COUNTS
    return std::rint(std::min(std::max(v / threshold, W(0)), most));
#else
    return does_fire(v - threshold) ? W(1) : W(0);
#endif
}

// The membrane after that many spikes.
template <class W> inline W after_reset(W v, W spikes, W threshold) {
#if COUNTS
    return v - threshold * spikes;
#else
    return spikes > 0 ? (HARD_RESET ? W(0) : v - threshold) : v;
#endif
}

// The surrogate, x above the threshold.
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

// The derivative of the number of spikes of a membrane.
template <class W> inline W derivative(W v, W threshold, W width, W most) {
#if COUNTS
    const W in_thresholds = v / threshold;
    return (in_thresholds >= 0 && in_thresholds <= most ? W(1) : W(0)) / threshold;
#else
    return slope(v - threshold, width);
#endif
}

// Runs body(channel, length) over all channels of a row; the compiler knows a length of CHANNELS.
template <class Body> inline void over_channels(int64_t channels, Body body) {
    int64_t c = 0;
    for (; c + CHANNELS <= channels; c += CHANNELS)
        body(c, std::integral_constant<int, CHANNELS>());
    if (c < channels) body(c, int(channels - c));
}

// The same for the group of CHANNELS that begins at a channel.
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
    const W* start;     // membranes, (1, N, C), or currents, (PAST, N, C), or null
    const X* identity;  // (T, N, C) or null
    X* spikes;          // (T, N, C)
    uint8_t* packed;    // likewise, or null
    W* end;             // like start
    int64_t timesteps, rows, channels, shared;
    Neuron neuron;
};

// What is added to the normalised current; ALONE: nothing, and x is the current.
enum Shortcut { ALONE, NONE, PLAIN, NORMALIZED };

// The current of a channel; all pointers are at the first channel of the group.
template <Shortcut SHORTCUT, class W, class X>
inline W current_of(const X* x, const X* shortcut, const W* gain, const W* offset, const W* gain2,
                    const W* offset2, int c) {
    W current = wide(x[c]);
    if (SHORTCUT != ALONE) current = current * gain[c] + offset[c];
    if (SHORTCUT == PLAIN) current += wide(shortcut[c]);
    if (SHORTCUT == NORMALIZED) current += wide(shortcut[c]) * gain2[c] + offset2[c];
    return current;
}

template <Shortcut SHORTCUT, bool IDENTITY, class X, class Length>
inline void forward_part(const Forward<X>& f, int64_t n, int64_t c0, Length length) {
    using W = Wide<X>;
    const W decay(f.neuron.decay), threshold(f.neuron.threshold), most(f.neuron.most);
    const W share(f.neuron.share), levels(f.neuron.levels);
    const int64_t at = n * f.channels + c0, plane = f.rows * f.channels;
    const W *gain = f.gain + c0, *offset = f.offset + c0;
    const W *gain2 = f.shortcut_gain + c0, *offset2 = f.shortcut_offset + c0;
#if PARALLEL
    const int64_t past = f.neuron.past;
    static thread_local std::vector<W> currents;
    currents.resize((past + f.timesteps) * CHANNELS);
    copy_past(f.neuron, f.start ? f.start + at : nullptr, plane, currents.data(), length);
    for (int64_t t = 0; t < f.timesteps; t++) {
        const X *x = f.x + (f.shared ? at : t * plane + at), *shortcut = f.shortcut + t * plane + at;
        W* current = currents.data() + (past + t) * CHANNELS;
#pragma omp simd
        for (int c = 0; c < length; c++)
            current[c] = current_of<SHORTCUT, W>(x, shortcut, gain, offset, gain2, offset2, c);
    }
#else
    W u[CHANNELS];
    for (int c = 0; c < length; c++) u[c] = f.start ? f.start[at + c] : W(0);
#endif
    for (int64_t t = 0; t < f.timesteps; t++) {
        const int64_t now = t * plane + at;
        const X* x = f.x + (f.shared ? at : now);
        const X *shortcut = f.shortcut + now, *identity = f.identity + now;
        X* spikes = f.spikes + now;
        W out[CHANNELS];
#if PARALLEL
        W h[CHANNELS];
        sum_over_time(f.neuron, f.timesteps, t, currents.data(), h, length);
#pragma omp simd
        for (int c = 0; c < length; c++) {
            out[c] = h[c] >= 0 ? W(1) : W(0);
            if (IDENTITY) out[c] += wide(identity[c]);
            spikes[c] = narrow<X>(out[c]);
        }
#else
#pragma omp simd
        for (int c = 0; c < length; c++) {
            W current = current_of<SHORTCUT, W>(x, shortcut, gain, offset, gain2, offset2, c);
            if (SCALES_INPUT) current *= share;
            W v = decay * u[c] + current;
            const W number = spikes_of(v, threshold, most);
            out[c] = COUNTS ? number / levels : number;
            if (IDENTITY) out[c] += wide(identity[c]);
            spikes[c] = narrow<X>(out[c]);
            if (COUNTS) out[c] *= levels;
            u[c] = after_reset(v, number, threshold);
        }
#endif
        if (f.packed) {
            uint8_t* packed = f.packed + now;
#pragma omp simd
            for (int c = 0; c < length; c++) packed[c] = uint8_t(int32_t(out[c]));
        }
    }
    if (!f.end) return;
#if PARALLEL
    for (int64_t s = 0; s < past; s++)
        for (int c = 0; c < length; c++)
            f.end[s * plane + at + c] = currents[(f.timesteps + s) * CHANNELS + c];
#else
    for (int c = 0; c < length; c++) f.end[at + c] = u[c];
#endif
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
    const W* start;        // as in Forward
    const X* grad_spikes;  // (T, N, C)
    const W* grad_end;     // like start
    X* total;              // gradient of the current, (T, N, C), or null
    X* own;                // its sum over time, (N, C), where all timesteps share x; or null
    W *sum_grad, *sum_grad_xhat, *sum_grad_shortcut_hat;  // (C,); the last, or all, may be null
    W* grad_start;                                        // like start
    W* partial;                                           // (blocks, 3, C)
    double *sum_share, *partial_share;  // (K,), (parts, K): gradients of the K learnt numbers
    int64_t timesteps, rows, channels, shared;
    Neuron neuron;
};

#if PARALLEL
// Computes the gradient of one of the PAST + T currents from those of the sums, (T, CHANNELS), and
// from its own if it is among the last currents.
template <class X, class Length>
inline void gradient_of_current(const Backward<X>& b, const Wide<X>* grad_sums, int64_t s,
                                int64_t at, Wide<X>* grad, Length length) {
    using W = Wide<X>;
    const int64_t number = b.neuron.past + b.timesteps, plane = b.rows * b.channels;
    const W* end = b.grad_end && s >= b.timesteps ? b.grad_end + (s - b.timesteps) * plane + at : nullptr;
    for (int c = 0; c < length; c++) grad[c] = end ? end[c] : W(0);
    for (int64_t t = 0; t < b.timesteps; t++) {
        const W weight(b.neuron.weights[t * number + s]);
        const W* grad_h = grad_sums + t * CHANNELS;
#pragma omp simd
        for (int c = 0; c < length; c++) grad[c] += weight * grad_h[c];
    }
}
#endif

template <Shortcut SHORTCUT, class X, class Length>
inline void backward_part(const Backward<X>& b, int64_t n, int64_t c0, Length length, Wide<X>* us,
                          Wide<X>* sum, Wide<X>* sum_x, Wide<X>* sum_shortcut,
                          double* sum_share) {
    using W = Wide<X>;
    const W decay(b.neuron.decay), threshold(b.neuron.threshold), width(b.neuron.width);
    const W share(b.neuron.share), most(b.neuron.most), levels(b.neuron.levels);
    const int64_t at = n * b.channels + c0, plane = b.rows * b.channels;
    const W *gain = b.gain + c0, *offset = b.offset + c0, *mean = b.mean + c0;
    const W *gain2 = b.shortcut_gain + c0, *offset2 = b.shortcut_offset + c0;
    const W* mean2 = b.shortcut_mean + c0;
    W u[CHANNELS], after[CHANNELS], over_time[CHANNELS], with_x[CHANNELS], with_shortcut[CHANNELS];
    W with_share[CHANNELS];
    const int64_t past = PARALLEL ? b.neuron.past : 0;
#if PARALLEL
    copy_past(b.neuron, b.start ? b.start + at : nullptr, plane, us, length);
#else
    for (int c = 0; c < length; c++) u[c] = b.start ? b.start[at + c] : W(0);
#endif
    for (int64_t t = 0; t < b.timesteps; t++) {  // the membranes, or currents, again
        const X *x = b.x + (b.shared ? at : t * plane + at), *shortcut = b.shortcut + t * plane + at;
        W* before_reset = us + (past + t) * CHANNELS;
#pragma omp simd
        for (int c = 0; c < length; c++) {
            W current = current_of<SHORTCUT, W>(x, shortcut, gain, offset, gain2, offset2, c);
            if (PARALLEL) {
                before_reset[c] = current;
                continue;
            }
            if (SCALES_INPUT) current *= share;
            const W v = decay * u[c] + current;
            before_reset[c] = v;
            u[c] = after_reset(v, spikes_of(v, threshold, most), threshold);
        }
    }
    for (int c = 0; c < length; c++) {
        after[c] = b.grad_end && !PARALLEL ? b.grad_end[at + c] : W(0);
        over_time[c] = with_x[c] = with_shortcut[c] = with_share[c] = 0;
    }
#if PARALLEL
    // Gradients of the weighted sums and of their weights; `us` are the currents.
    static thread_local std::vector<W> grad_sums;
    grad_sums.resize(b.timesteps * CHANNELS);
    const int64_t number = past + b.timesteps;
    for (int64_t t = 0; t < b.timesteps; t++) {
        const X* grad_spikes = b.grad_spikes + t * plane + at;
        W* grad_h = grad_sums.data() + t * CHANNELS;
        W h[CHANNELS];
        sum_over_time(b.neuron, b.timesteps, t, us, h, length);
#pragma omp simd
        for (int c = 0; c < length; c++) grad_h[c] = wide(grad_spikes[c]) * slope(h[c], width);
        W of_bias = 0;
        for (int64_t s = 0; s < number; s++) {
            const W* current = us + s * CHANNELS;
            W of_weight = 0;
#pragma omp simd reduction(+ : of_weight)
            for (int c = 0; c < length; c++) of_weight += grad_h[c] * current[c];
            sum_share[t * number + s] += of_weight;
        }
#pragma omp simd reduction(+ : of_bias)
        for (int c = 0; c < length; c++) of_bias += grad_h[c];
        sum_share[b.timesteps * number + t] += of_bias;
    }
#endif
    for (int64_t t = b.timesteps - 1; t >= 0; t--) {
        const int64_t now = t * plane + at;
        const X *x = b.x + (b.shared ? at : now), *grad_spikes = b.grad_spikes + now;
        const X* shortcut = b.shortcut + now;
        const W* before_reset = us + t * CHANNELS;
        W grad[CHANNELS];
#if PARALLEL
        gradient_of_current(b, grad_sums.data(), past + t, at, grad, length);
#pragma omp simd
        for (int c = 0; c < length; c++) {
            const W g = grad[c];
            over_time[c] += g;
            if (SHORTCUT != ALONE) with_x[c] += g * (wide(x[c]) - mean[c]);
            if (SHORTCUT == NORMALIZED) with_shortcut[c] += g * (wide(shortcut[c]) - mean2[c]);
        }
#else
        W before[CHANNELS];
        // The membranes before this timestep. A condition on t in the loop below would prevent its
        // vectorisation.
        if (LEARNS_DECAY && t > 0) {
            const W* earlier = us + (t - 1) * CHANNELS;
#pragma omp simd
            for (int c = 0; c < length; c++)
                before[c] = after_reset(earlier[c], spikes_of(earlier[c], threshold, most), threshold);
        } else if (LEARNS_DECAY) {
            for (int c = 0; c < length; c++) before[c] = b.start ? b.start[at + c] : W(0);
        }
#pragma omp simd
        for (int c = 0; c < length; c++) {
            const W v = before_reset[c];
            const bool fires = !COUNTS && does_fire(v - threshold);
            const W kept = HARD_RESET && fires ? W(0) : after[c];
            const W through_reset = DETACH_RESET ? W(0) : after[c] * (HARD_RESET ? v : threshold);
            const W sent = COUNTS ? wide(grad_spikes[c]) / levels : wide(grad_spikes[c]);
            const W fired = (sent - through_reset) * derivative(v, threshold, width, most);
            const W of_v = fired + kept;
            if (LEARNS_DECAY) {
                // v is (1 - share) times the membrane before, plus the current or its share.
                with_share[c] += of_v * (SCALES_INPUT ? (v - before[c]) / share : -before[c]);
            }
            const W g = SCALES_INPUT ? of_v * share : of_v;
            grad[c] = g;
            over_time[c] += g;
            if (SHORTCUT != ALONE) with_x[c] += g * (wide(x[c]) - mean[c]);
            if (SHORTCUT == NORMALIZED) with_shortcut[c] += g * (wide(shortcut[c]) - mean2[c]);
            after[c] = decay * of_v;  // the gradient of the membrane before
        }
#endif
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
    if (LEARNS_DECAY) {
        W of_group = 0;
#pragma omp simd reduction(+ : of_group)
        for (int c = 0; c < length; c++) of_group += with_share[c];
        *sum_share += of_group;
    }
    if (b.own)
        for (int c = 0; c < length; c++) b.own[at + c] = narrow<X>(over_time[c]);
    if (!b.grad_start) return;
#if PARALLEL
    for (int64_t s = 0; s < past; s++)
        gradient_of_current(b, grad_sums.data(), s, at, b.grad_start + s * plane + at, length);
#else
    for (int c = 0; c < length; c++) b.grad_start[at + c] = after[c];
#endif
}

// Allocates a part's gradients of the learnt values, set to 0.
template <class X> double* share_of(const Backward<X>& b, int64_t part) {
    const int64_t learned = num_learned(b.neuron, b.timesteps);
    double* share = b.partial_share + part * learned;
    std::fill(share, share + learned, 0.0);
    return share;
}

template <class X> void add_shares(const Backward<X>& b, int64_t parts) {
    const int64_t learned = num_learned(b.neuron, b.timesteps);
    std::fill(b.sum_share, b.sum_share + learned, 0.0);
    for (int64_t part = 0; part < parts; part++)
        for (int64_t k = 0; k < learned; k++) b.sum_share[k] += b.partial_share[part * learned + k];
}

template <Shortcut SHORTCUT, class X> void backward_rows(const Backward<X>& b, int threads) {
    using W = Wide<X>;
    const int64_t step = rows_of_block(b.channels), blocks = (b.rows + step - 1) / step;
#pragma omp parallel num_threads(threads)
    {
        std::vector<W> us((b.neuron.past + b.timesteps) * CHANNELS);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            W *sum = b.partial + 3 * block * b.channels, *sum_x = sum + b.channels;
            W* sum_shortcut = sum_x + b.channels;
            std::fill(sum, sum + 3 * b.channels, W(0));
            double* share = share_of(b, block);
            for (int64_t n = block * step; n < std::min(b.rows, (block + 1) * step); n++)
                over_channels(b.channels, [&](int64_t c, auto length) {
                    backward_part<SHORTCUT>(b, n, c, length, us.data(), sum, sum_x, sum_shortcut,
                                            share);
                });
        }
    }
    add_shares(b, blocks);
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
        std::vector<W> us((b.neuron.past + b.timesteps) * CHANNELS);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < row.channels; first += CHANNELS)
            of_group(row.channels, first, [&](int64_t c, auto length) {
                W* none = nullptr;
                double* share = share_of(b, first / CHANNELS);
                backward_part<ALONE>(row, 0, c, length, us.data(), none, none, none, share);
            });
    }
    add_shares(b, (row.channels + CHANNELS - 1) / CHANNELS);
}

template <class X> void backward(const Backward<X>& b, int threads) {
    if (!b.gain) backward_alone(b, threads);
    else if (!b.shortcut) backward_rows<NONE>(b, threads);
    else if (!b.shortcut_gain) backward_rows<PLAIN>(b, threads);
    else backward_rows<NORMALIZED>(b, threads);
}

}  // namespace

extern "C" {

#define KERNELS(X, NAME)                                                                           \
    void forward_##NAME(const Forward<X>* f, int threads) { forward<X>(*f, threads); }             \
    void backward_##NAME(const Backward<X>* b, int threads) { backward<X>(*b, threads); }

KERNELS(float, float32)
KERNELS(double, float64)
KERNELS(bf16, bfloat16)
}
