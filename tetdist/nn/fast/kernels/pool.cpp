// Max-pooling on a CPU, for native_pool.py: of spikes in bytes, and of a normalised current.
//
// Images are contiguous (N, H, W, C). For each output a byte stores its position in the window (of
// equal maxima the first, as in torch), so the backward pass needs nothing else.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "types.h"

namespace {

struct Sizes {
    int64_t images, height, width, channels, out_height, out_width, kernel, stride, padding;
};

template <class X>
void forward(const uint8_t* in, X* out, uint8_t* packed, uint8_t* from, const Sizes& s,
             double levels, int threads) {
    using W = Wide<X>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < s.images * s.out_height; row++) {
        const int64_t image = row / s.out_height, top = row % s.out_height * s.stride - s.padding;
        for (int64_t column = 0; column < s.out_width; column++) {
            const int64_t left = column * s.stride - s.padding;
            const int64_t at = (row * s.out_width + column) * s.channels;
            uint8_t *most = packed + at, *where = from + at;
            bool first = true;
            for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + s.kernel, s.height); y++)
                for (int64_t x = std::max<int64_t>(left, 0); x < std::min(left + s.kernel, s.width);
                     x++) {
                    const uint8_t* value = in + ((image * s.height + y) * s.width + x) * s.channels;
                    const uint8_t position = uint8_t((y - top) * s.kernel + x - left);
                    if (first) {
                        std::copy(value, value + s.channels, most);
                        std::fill(where, where + s.channels, position);
                        first = false;
                        continue;
                    }
#pragma omp simd
                    for (int64_t c = 0; c < s.channels; c++) {
                        const bool larger = value[c] > most[c];
                        most[c] = larger ? value[c] : most[c];
                        where[c] = larger ? position : where[c];
                    }
                }
#pragma omp simd
            for (int64_t c = 0; c < s.channels; c++) out[at + c] = narrow<X>(W(most[c]) / W(levels));
        }
    }
}

// The same for gain * x + offset, per channel, which is never stored.
template <class X>
void forward_normalized(const X* in, const Wide<X>* gain, const Wide<X>* offset, X* out,
                        uint8_t* from, const Sizes& s, int threads) {
    using W = Wide<X>;
#pragma omp parallel num_threads(threads)
    {
        std::vector<W> most(s.channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.images * s.out_height; row++) {
            const int64_t image = row / s.out_height, top = row % s.out_height * s.stride - s.padding;
            for (int64_t column = 0; column < s.out_width; column++) {
                const int64_t left = column * s.stride - s.padding;
                const int64_t at = (row * s.out_width + column) * s.channels;
                uint8_t* where = from + at;
                bool first = true;
                for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + s.kernel, s.height);
                     y++)
                    for (int64_t x = std::max<int64_t>(left, 0);
                         x < std::min(left + s.kernel, s.width); x++) {
                        const X* value = in + ((image * s.height + y) * s.width + x) * s.channels;
                        const uint8_t position = uint8_t((y - top) * s.kernel + x - left);
                        if (first) {
                            for (int64_t c = 0; c < s.channels; c++)
                                most[c] = wide(value[c]) * gain[c] + offset[c];
                            std::fill(where, where + s.channels, position);
                            first = false;
                            continue;
                        }
#pragma omp simd
                        for (int64_t c = 0; c < s.channels; c++) {
                            const W v = wide(value[c]) * gain[c] + offset[c];
                            const bool larger = v > most[c];
                            most[c] = larger ? v : most[c];
                            where[c] = larger ? position : where[c];
                        }
                    }
#pragma omp simd
                for (int64_t c = 0; c < s.channels; c++) out[at + c] = narrow<X>(most[c]);
            }
        }
    }
}

template <class X>
void backward(const X* grad_out, const uint8_t* from, X* grad_in, const Sizes& s, int threads) {
    using W = Wide<X>;
#pragma omp parallel num_threads(threads)
    {
        std::vector<W> sum(s.channels);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.images * s.height; row++) {
            const int64_t image = row / s.height, y = row % s.height + s.padding;
            // Windows that contain the row: o * stride <= y < o * stride + kernel.
            const int64_t first_row = std::max<int64_t>(0, (y - s.kernel + s.stride) / s.stride);
            const int64_t last_row = std::min(s.out_height - 1, y / s.stride);
            for (int64_t column = 0; column < s.width; column++) {
                const int64_t x = column + s.padding;
                const int64_t first = std::max<int64_t>(0, (x - s.kernel + s.stride) / s.stride);
                const int64_t last = std::min(s.out_width - 1, x / s.stride);
                std::fill(sum.begin(), sum.end(), W(0));
                for (int64_t o = first_row; o <= last_row; o++)
                    for (int64_t p = first; p <= last; p++) {
                        const uint8_t position =
                            uint8_t((y - o * s.stride) * s.kernel + x - p * s.stride);
                        const int64_t at =
                            ((image * s.out_height + o) * s.out_width + p) * s.channels;
#pragma omp simd
                        for (int64_t c = 0; c < s.channels; c++)
                            sum[c] += from[at + c] == position ? wide(grad_out[at + c]) : W(0);
                    }
                X* grad = grad_in + (row * s.width + column) * s.channels;
#pragma omp simd
                for (int64_t c = 0; c < s.channels; c++) grad[c] = narrow<X>(sum[c]);
            }
        }
    }
}

}  // namespace

extern "C" {

#define POOL(X, NAME)                                                                              \
    void forward_##NAME(const uint8_t* in, X* out, uint8_t* packed, uint8_t* from, const Sizes* s, \
                        double levels, int threads) {                                              \
        forward<X>(in, out, packed, from, *s, levels, threads);                                    \
    }                                                                                              \
    void forward_normalized_##NAME(const X* in, const Wide<X>* gain, const Wide<X>* offset, X* out,\
                                   uint8_t* from, const Sizes* s, int threads) {                   \
        forward_normalized<X>(in, gain, offset, out, from, *s, threads);                           \
    }                                                                                              \
    void backward_##NAME(const X* grad_out, const uint8_t* from, X* grad_in, const Sizes* s,       \
                         int threads) {                                                            \
        backward<X>(grad_out, from, grad_in, *s, threads);                                         \
    }

POOL(float, float32)
POOL(double, float64)
POOL(bf16, bfloat16)
}
