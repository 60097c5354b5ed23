// Normalisation on a CPU, alone and with an added shortcut: kernels of fused.py.
//
// Tensors are contiguous (rows, C): rows = T*B*H*W, channels last. "Wide" is the compute type:
// float, or double for double. A sum over rows adds up sums over blocks of rows, whose size does
// not depend on the number of threads; so results do not, either.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"
#include "types.h"

namespace {

// ------------------------------------------------------------------------------------ statistics

template <class X>
void statistics(const X* x, int64_t rows, int64_t channels, Wide<X>* mean, Wide<X>* var,
                Wide<X>* partial, int threads) {
    using W = Wide<X>;
    const int64_t step = rows_of_block(channels), blocks = (rows + step - 1) / step;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        W *sum = partial + 2 * b * channels, *square = sum + channels;
        const int64_t first = b * step, last = std::min(rows, first + step);
        std::fill(sum, sum + 2 * channels, W(0));
        for (int64_t n = first; n < last; n++) {
            const X* row = x + n * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) sum[c] += wide(row[c]);
        }
        // Variance of the block around its own mean, since subtracting a squared mean from a mean
        // square would cancel. The second pass finds the block in the cache.
        std::vector<W> center(sum, sum + channels);
        for (auto& value : center) value /= W(last - first);
        for (int64_t n = first; n < last; n++) {
            const X* row = x + n * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                W d = wide(row[c]) - center[c];
                square[c] += d * d;
            }
        }
    }
    // Statistics of the union of blocks: Chan, Golub and LeVeque.
    for (int64_t c = 0; c < channels; c++) {
        double total = 0, squares = 0, count = 0;
        for (int64_t b = 0; b < blocks; b++) {
            const double n = double(std::min(rows, (b + 1) * step) - b * step);
            const double sum = partial[2 * b * channels + c];
            if (count > 0) {
                const double d = sum / n - total / count;
                squares += d * d * n * count / (n + count);
            }
            squares += partial[(2 * b + 1) * channels + c];
            total += sum;
            count += n;
        }
        mean[c] = W(total / count);
        var[c] = W(squares / count);
    }
}

// ---------------------------------------------------------------------------------- and a shortcut

template <class X> struct Add {
    using W = Wide<X>;
    const X* x;         // (rows, C)
    const X* shortcut;  // (period, C): row n is added to rows n, n + period, ...; or null
    const W *gain, *offset, *mean, *rstd;
    const W *shortcut_gain, *shortcut_offset, *shortcut_mean, *shortcut_rstd;  // or all null
    X* out;                                               // of the forward pass, (rows, C)
    const X* grad;                                        // of the backward pass, likewise
    W *sum_grad, *sum_grad_xhat, *sum_grad_shortcut_hat;  // (C,); the last may be null
    W* partial;                                           // (blocks, 3, C)
    int64_t rows, channels, period;
};

// What is added to the normalised x.
enum Shortcut { NONE, PLAIN, NORMALIZED };

template <Shortcut SHORTCUT, class X> void add_rows(const Add<X>& a, int threads) {
    using W = Wide<X>;
    const W *gain = a.gain, *offset = a.offset;
    const W *gain2 = a.shortcut_gain, *offset2 = a.shortcut_offset;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < a.rows; n++) {
        const X* x = a.x + n * a.channels;
        const X* shortcut = SHORTCUT == NONE ? nullptr : a.shortcut + n % a.period * a.channels;
        X* out = a.out + n * a.channels;
#pragma omp simd
        for (int64_t c = 0; c < a.channels; c++) {
            W sum = wide(x[c]) * gain[c] + offset[c];
            if (SHORTCUT == PLAIN) sum += wide(shortcut[c]);
            if (SHORTCUT == NORMALIZED) sum += wide(shortcut[c]) * gain2[c] + offset2[c];
            out[c] = narrow<X>(sum);
        }
    }
}

template <class X> void add(const Add<X>& a, int threads) {
    if (!a.shortcut) add_rows<NONE>(a, threads);
    else if (!a.shortcut_gain) add_rows<PLAIN>(a, threads);
    else add_rows<NORMALIZED>(a, threads);
}

// Sums of the gradient, and of its products with the normalised x and the normalised shortcut.
template <bool NORMALIZED_SHORTCUT, class X> void sum_rows(const Add<X>& a, int threads) {
    using W = Wide<X>;
    const int64_t step = rows_of_block(a.channels), blocks = (a.rows + step - 1) / step;
    const W *mean = a.mean, *mean2 = a.shortcut_mean;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        W *sum = a.partial + 3 * block * a.channels, *with_x = sum + a.channels;
        W* with_shortcut = with_x + a.channels;
        std::fill(sum, sum + 3 * a.channels, W(0));
        for (int64_t n = block * step; n < std::min(a.rows, (block + 1) * step); n++) {
            const X *x = a.x + n * a.channels, *grad = a.grad + n * a.channels;
            const X* shortcut =
                NORMALIZED_SHORTCUT ? a.shortcut + n % a.period * a.channels : nullptr;
#pragma omp simd
            for (int64_t c = 0; c < a.channels; c++) {
                const W g = wide(grad[c]);
                sum[c] += g;
                with_x[c] += g * (wide(x[c]) - mean[c]);
                if (NORMALIZED_SHORTCUT) with_shortcut[c] += g * (wide(shortcut[c]) - mean2[c]);
            }
        }
    }
    for (int64_t c = 0; c < a.channels; c++) {
        double sums[3] = {0, 0, 0};
        for (int64_t block = 0; block < blocks; block++)
            for (int i = 0; i < 3; i++) sums[i] += a.partial[(3 * block + i) * a.channels + c];
        a.sum_grad[c] = W(sums[0]);
        a.sum_grad_xhat[c] = W(sums[1] * a.rstd[c]);
        if (NORMALIZED_SHORTCUT) a.sum_grad_shortcut_hat[c] = W(sums[2] * a.shortcut_rstd[c]);
    }
}

template <class X> void add_sums(const Add<X>& a, int threads) {
    if (a.shortcut_gain) sum_rows<true>(a, threads);
    else sum_rows<false>(a, threads);
}

// Batch norm's backward pass; grad_x may be grad_y.
template <class X>
void input_gradient(const X* x, const X* grad_y, const Wide<X>* gain, const Wide<X>* mean,
                    const Wide<X>* rstd, const Wide<X>* sum_grad, const Wide<X>* sum_grad_xhat,
                    X* grad_x, int64_t rows, int64_t channels, int threads) {
    using W = Wide<X>;
    std::vector<W> a(channels), b(channels);
    for (int64_t c = 0; c < channels; c++) {
        a[c] = sum_grad[c] / W(rows);
        b[c] = sum_grad_xhat[c] / W(rows);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const X *row = x + n * channels, *grad = grad_y + n * channels;
        X* out = grad_x + n * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            const W xhat = (wide(row[c]) - mean[c]) * rstd[c];
            out[c] = narrow<X>(gain[c] * (wide(grad[c]) - a[c] - xhat * b[c]));
        }
    }
}

}  // namespace

extern "C" {

#define KERNELS(X, NAME)                                                                           \
    void statistics_##NAME(const X* x, int64_t rows, int64_t channels, Wide<X>* mean,              \
                           Wide<X>* var, Wide<X>* partial, int threads) {                          \
        statistics<X>(x, rows, channels, mean, var, partial, threads);                             \
    }                                                                                              \
    void add_##NAME(const Add<X>* a, int threads) { add<X>(*a, threads); }                         \
    void add_sums_##NAME(const Add<X>* a, int threads) { add_sums<X>(*a, threads); }               \
    void input_gradient_##NAME(const X* x, const X* grad_y, const Wide<X>* gain,                   \
                               const Wide<X>* mean, const Wide<X>* rstd, const Wide<X>* sum_grad,  \
                               const Wide<X>* sum_grad_xhat, X* grad_x, int64_t rows,              \
                               int64_t channels, int threads) {                                    \
        input_gradient<X>(x, grad_y, gain, mean, rstd, sum_grad, sum_grad_xhat, grad_x, rows,      \
                          channels, threads);                                                      \
    }

KERNELS(float, float32)
KERNELS(double, float64)
KERNELS(bf16, bfloat16)
}
