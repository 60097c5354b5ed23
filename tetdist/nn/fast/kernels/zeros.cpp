// Convolutions of spikes that skip their zeros, on a CPU, for native_zeros.py.
//
// The idea: a convolution of spikes adds up weights, one row of them (over the output channels) for
// each spike in the receptive field. `find` lists, for each row of an image, the positions
// x * channels + c of its spikes in ascending order. The spikes that an output pixel sees in one
// row of its field are a contiguous part of that list, and if the weights of that row lie in the
// same order, [kx][c][output channel], then position minus the field's left edge is the index of
// the row of weights to add. 64 output channels are added in registers; one kernel row after
// another passes over many pixels, so that its weights stay in the cache. Every output is added in
// the order (ky, kx, c), whatever the batch and the number of threads, so its bits do not depend on
// them. The weight gradient turns this round: for each input channel the rows of the output
// gradient at its spikes are added.
//
// Images are contiguous (N, H, W, C); weights (out_channels, C, kernel, kernel).

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "types.h"

namespace {

constexpr int64_t LANES = 16, VECTORS = 4, WIDTH = LANES * VECTORS;  // output channels at a time
// Pixels that one kernel row passes over: their sums and its weights fit the second-level cache.
constexpr int64_t PIXELS = 512;
// The same for gradient rows, which should fit the first-level cache.
constexpr int64_t GRADIENT_PIXELS = 400;

struct Sizes {
    int64_t images, height, width, channels, out_height, out_width, out_channels;
    int64_t kernel, stride, padding;

    int64_t blocks() const { return (out_channels + WIDTH - 1) / WIDTH; }
    int64_t row_of_weights() const { return kernel * channels * WIDTH; }
    int64_t room() const { return width * channels + 2 * LANES; }  // for a row's positions
};

// Positions of the spikes of each row of each image, and where each pixel's begin among them.
struct Spikes {
    const uint16_t* positions;
    const int32_t* starts;
    const Sizes& s;

    const uint16_t* of(int64_t row, int64_t pixel) const {
        return positions + row * s.room() + starts[row * (s.width + 1) + pixel];
    }
};

template <class S> struct Vector;
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64))); };
template <> struct Vector<int32_t> { typedef int32_t type __attribute__((vector_size(64))); };

// Weights by the type in which they are added up.
template <class W> struct SumOf { using type = float; };
template <> struct SumOf<int8_t> { using type = int32_t; };
template <class W> using Sum = typename SumOf<W>::type;
template <class W> using Sums = typename Vector<Sum<W>>::type;

template <class T, class S> inline typename Vector<S>::type load(const T* from) {
    if constexpr (std::is_same_v<T, S>) {
        typename Vector<S>::type all;
        std::memcpy(&all, from, sizeof all);
        return all;
    } else {
        typedef int8_t Quarter __attribute__((vector_size(16)));
        Quarter quarter;
        std::memcpy(&quarter, from, sizeof quarter);
#ifdef __AVX512F__
        return (typename Vector<S>::type)_mm512_cvtepi8_epi32((__m128i)quarter);
#else
        return __builtin_convertvector(quarter, typename Vector<S>::type);
#endif
    }
}

// Adds a row of weights, over a block's output channels, to their sums.
template <class W> inline void add(const W* weights, Sums<W> (&total)[VECTORS]) {
    if constexpr (std::is_same_v<W, bf16>) {
        // Channels 2i and 2i+1 share 32 bits; widening each vector by itself takes 1.3 times as long.
        typedef uint32_t Pairs __attribute__((vector_size(64)));
        for (int v = 0; v < VECTORS; v += 2) {
            Pairs pairs;
            std::memcpy(&pairs, weights + v * LANES, sizeof pairs);
            total[v] += (Sums<W>)(pairs << 16);
            total[v + 1] += (Sums<W>)(pairs & 0xffff0000u);
        }
    } else {
        for (int v = 0; v < VECTORS; v++) total[v] += load<W, Sum<W>>(weights + v * LANES);
    }
}

// Puts the sums that `add` made in the order of their output channels.
template <class W> inline void sort(Sums<W> (&total)[VECTORS]) {
    if constexpr (std::is_same_v<W, bf16>) {
        typedef int32_t Lanes __attribute__((vector_size(64)));
        Lanes low;  // alternately of the first and of the second vector
        for (int i = 0; i < LANES; i++) low[i] = i / 2 + i % 2 * LANES;
        for (int v = 0; v < VECTORS; v += 2) {
            const Sums<W> even = total[v], odd = total[v + 1];
            total[v] = __builtin_shuffle(even, odd, low);
            total[v + 1] = __builtin_shuffle(even, odd, low + int(LANES) / 2);
        }
    }
}

template <class S> struct Aligned {
    S* data;
    explicit Aligned(int64_t count)
        : data(static_cast<S*>(std::aligned_alloc(64, (count * sizeof(S) + 63) / 64 * 64))) {}
    ~Aligned() { std::free(data); }
};

// Appends `first + i` for every i with a spike; may write up to 31 positions more.
uint16_t* append(const uint8_t* spikes, int64_t count, int64_t first, uint16_t* to) {
    int64_t i = 0;
#ifdef __AVX512VBMI2__
    alignas(64) static const auto ascending = [] {
        std::array<uint16_t, 32> numbers{};
        for (int j = 0; j < 32; j++) numbers[j] = uint16_t(j);
        return numbers;
    }();
    const __m512i lanes = _mm512_load_si512(ascending.data());
    for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(spikes + i));
        const __mmask32 active = _mm256_test_epi8_mask(bytes, bytes);
        const __m512i all = _mm512_add_epi16(lanes, _mm512_set1_epi16(short(first + i)));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(active, all));
        to += __builtin_popcount(active);
    }
#endif
    for (; i < count; i++) {
        *to = uint16_t(first + i);
        to += spikes[i] != 0;
    }
    return to;
}

// Returns whether all values are 0 or 1.
template <class X>
bool find(const X* x, uint16_t* positions, int32_t* starts, const Sizes& s, int threads) {
    const int64_t rows = s.images * s.height, count = s.width * s.channels;
    bool other = false;
#pragma omp parallel num_threads(threads) reduction(| : other)
    {
        std::vector<uint8_t> bytes(count);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            int32_t* start = starts + row * (s.width + 1);
            const X* from = x + row * count;
            uint8_t unlike = 0;
            for (int64_t i = 0; i < count; i++) {
                const auto value = wide(from[i]);
                bytes[i] = value != 0;
                unlike |= uint8_t((value != 0) & (value != 1));
            }
            other |= unlike != 0;
            uint16_t *first = positions + row * s.room(), *to = first;
            for (int64_t pixel = 0; pixel < s.width; pixel++) {
                start[pixel] = int32_t(to - first);
                const int64_t at = pixel * s.channels;
                to = append(bytes.data() + at, s.channels, at, to);
            }
            start[s.width] = int32_t(to - first);
        }
    }
    return !other;
}

// Exchanges the blocks of HALF x HALF numbers off the diagonal. The compiler knows HALF, or else the
// lanes would be computed each time.
template <int HALF, class Row, class Lane> inline void exchange(Row (&all)[LANES]) {
    Row low, high;  // lanes of the first row of a pair, and LANES + lanes of the second
    for (int j = 0; j < LANES; j++) {
        low[j] = Lane(j & HALF ? LANES + j - HALF : j);
        high[j] = Lane(j & HALF ? LANES + j : j + HALF);
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) {
            const Row first = all[i], second = all[i + HALF];
            all[i] = __builtin_shuffle(first, second, low);
            all[i + HALF] = __builtin_shuffle(first, second, high);
        }
}

template <class W>
void transpose(const W (&rows)[LANES][LANES], W (&columns)[LANES][LANES]) {
    using Bits = std::conditional_t<sizeof(W) == 4, uint32_t,
                                    std::conditional_t<sizeof(W) == 2, uint16_t, uint8_t>>;
    typedef Bits Row __attribute__((vector_size(LANES * sizeof(W))));
    Row all[LANES];
    std::memcpy(all, rows, sizeof all);
    exchange<1, Row, Bits>(all);
    exchange<2, Row, Bits>(all);
    exchange<4, Row, Bits>(all);
    exchange<8, Row, Bits>(all);
    std::memcpy(columns, all, sizeof all);
}

// Weights as [block of output channels][ky][kx][c][output channel of the block]; some channels at a
// time, which fit the first-level cache, so that what is written is contiguous.
template <class W> void lay_out(const W* weight, W* laid, const Sizes& s, int threads) {
    const int64_t field = s.kernel * s.kernel, count = field * s.channels;
    const int64_t parts = (s.channels + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
    {
        Aligned<W> turned(LANES * field * WIDTH);  // [c][ky][kx][output channel]
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.blocks() * parts; task++) {
            const int64_t block = task / parts, first = task % parts * LANES;
            const int64_t channels = std::min(LANES, s.channels - first);
            // The processor foresees no short parts that lie far apart.
            for (int64_t o = 0; o < std::min(WIDTH, s.out_channels - block * WIDTH); o++)
                for (int64_t i = 0; i < channels * field; i += 64 / int64_t(sizeof(W)))
                    __builtin_prefetch(weight + (block * WIDTH + o) * count + first * field + i);
            for (int64_t tile = 0; tile < field * VECTORS; tile++) {
                const int64_t out = tile % VECTORS * LANES, at = tile / VECTORS * LANES;
                const int64_t used = std::min(LANES, channels * field - at);
                W rows[LANES][LANES] = {}, columns[LANES][LANES];
                for (int64_t o = 0; o < LANES && block * WIDTH + out + o < s.out_channels; o++) {
                    const W* from = weight + (block * WIDTH + out + o) * count + first * field + at;
                    std::copy(from, from + std::max<int64_t>(used, 0), rows[o]);
                }
                transpose(rows, columns);
                for (int64_t i = 0; i < LANES; i++)
                    std::memcpy(turned.data + (at + i) * WIDTH + out, columns[i],
                                sizeof columns[i]);
            }
            for (int64_t tap = 0; tap < field; tap++)
                for (int64_t c = 0; c < channels; c++)
                    std::memcpy(laid + (block * count + tap * s.channels + first + c) * WIDTH,
                                turned.data + (c * field + tap) * WIDTH, WIDTH * sizeof(W));
        }
    }
}

// Adds up one block of output channels for some rows of output pixels.
template <class W>
void add_rows(const Spikes& spikes, const W* laid, int64_t first, int64_t last, Sum<W>* sums) {
    const Sizes& s = spikes.s;
    for (int64_t ky = 0; ky < s.kernel; ky++) {
        const W* of_row = laid + ky * s.row_of_weights();
        Sum<W>* at = sums;
        for (int64_t row = first; row < last; row++) {
            const int64_t y = row % s.out_height * s.stride - s.padding + ky;
            const bool inside = 0 <= y && y < s.height;
            const int64_t in_row = row / s.out_height * s.height + y;
            for (int64_t column = 0; column < s.out_width; column++, at += WIDTH) {
                Sums<W> total[VECTORS] = {};
                if (ky > 0)
                    for (int v = 0; v < VECTORS; v++)
                        total[v] = load<Sum<W>, Sum<W>>(at + v * LANES);
                if (inside) {
                    const int64_t left = column * s.stride - s.padding;
                    const uint16_t* position = spikes.of(in_row, std::max<int64_t>(left, 0));
                    const uint16_t* end = spikes.of(in_row, std::min(left + s.kernel, s.width));
                    const int64_t edge = left * s.channels;
                    for (; position < end; position++)
                        add(of_row + (*position - edge) * WIDTH, total);
                }
                if (ky == s.kernel - 1) sort<W>(total);
                std::memcpy(at, total, sizeof total);
            }
        }
    }
}

template <class W, class Y>
void forward(const Spikes& spikes, const W* laid, const Y* bias, Y* out, int threads) {
    const Sizes& s = spikes.s;
    const int64_t rows = s.images * s.out_height;
    const int64_t step = std::max<int64_t>(1, PIXELS / s.out_width);
    const int64_t strips = (rows + step - 1) / step;
#pragma omp parallel num_threads(threads)
    {
        Aligned<Sum<W>> sums(step * s.out_width * WIDTH);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.blocks() * strips; task++) {
            const int64_t channel = task / strips * WIDTH, first = task % strips * step;
            const int64_t last = std::min(rows, first + step);
            const int64_t used = std::min(WIDTH, s.out_channels - channel);
            add_rows(spikes, laid + channel * s.kernel * s.kernel * s.channels, first, last,
                     sums.data);
            for (int64_t pixel = 0; pixel < (last - first) * s.out_width; pixel++) {
                const Sum<W>* from = sums.data + pixel * WIDTH;
                Y* to = out + (first * s.out_width + pixel) * s.out_channels + channel;
                for (int64_t c = 0; c < used; c++)
                    to[c] = narrow<Y>(bias ? from[c] + wide(bias[channel + c]) : from[c]);
            }
        }
    }
}

// The output gradient as [block][image][row][column][output channel of the block], with rows and
// columns of zeros around it where a spike sees fewer outputs than the kernel has weights.
struct Framed {
    int64_t before, height, width;  // rows (and columns) of zeros before; sizes with zeros
    Aligned<float> all;

    Framed(const float* grad, const Sizes& s, int threads)
        : before(std::max<int64_t>(0, (s.kernel - 1) / s.stride - s.padding / s.stride)),
          height((s.height - 1 + s.padding) / s.stride + 1 + before),
          width((s.width - 1 + s.padding) / s.stride + 1 + before),
          all(s.blocks() * s.images * height * width * WIDTH) {
        const int64_t rows = s.images * height;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < width; column++) {
                const int64_t y = row % height - before, x = column - before;
                const bool inside = 0 <= y && y < s.out_height && 0 <= x && x < s.out_width;
                const int64_t pixel = (row / height * s.out_height + y) * s.out_width + x;
                for (int64_t block = 0; block < s.blocks(); block++) {
                    const int64_t channel = block * WIDTH;
                    const int64_t used = inside ? std::min(WIDTH, s.out_channels - channel) : 0;
                    const float* from = grad + pixel * s.out_channels + channel;
                    float* to = all.data + ((block * rows + row) * width + column) * WIDTH;
                    std::fill(std::copy(from, from + used, to), to + WIDTH, 0.0f);
                }
            }
    }
};

// Spikes by strip of rows, by the first ky and kx that see them, and by channel, as indices of
// pixels of the framed gradient.
struct ByChannel {
    int64_t step, strips;
    std::vector<int32_t> pixels;
    std::vector<int64_t> starts;

    ByChannel(const Spikes& spikes, const Framed& grad, int threads) {
        const Sizes& s = spikes.s;
        const int64_t rows = s.images * s.height;
        step = std::max<int64_t>(1, GRADIENT_PIXELS / grad.width * s.stride);
        strips = (rows + step - 1) / step;
        std::vector<int64_t> counts(strips + 1);
        for (int64_t row = 0; row < rows; row++)
            counts[row / step + 1] += spikes.of(row, s.width) - spikes.of(row, 0);
        for (int64_t strip = 0; strip < strips; strip++) counts[strip + 1] += counts[strip];
        pixels.resize(counts[strips]);
        starts.resize(strips * lists(s) + 1);
        starts.back() = counts[strips];
#pragma omp parallel num_threads(threads)
        {
            std::vector<int64_t> next(lists(s) + 1);
#pragma omp for schedule(static)
            for (int64_t strip = 0; strip < strips; strip++) {
                std::fill(next.begin(), next.end(), 0);
                each(spikes, grad, strip, [&](int64_t list, int32_t) { next[list + 1]++; });
                next[0] = counts[strip];
                for (int64_t list = 0; list < lists(s); list++) next[list + 1] += next[list];
                std::copy(next.begin(), next.end() - 1, starts.begin() + strip * lists(s));
                each(spikes, grad, strip,
                     [&](int64_t list, int32_t pixel) { pixels[next[list]++] = pixel; });
            }
        }
    }

    static int64_t lists(const Sizes& s) { return s.stride * s.stride * s.channels; }

    template <class Use>
    void each(const Spikes& spikes, const Framed& grad, int64_t strip, Use use) const {
        const Sizes& s = spikes.s;
        const int64_t last = std::min(s.images * s.height, (strip + 1) * step);
        for (int64_t row = strip * step; row < last; row++) {
            const int64_t y = row % s.height + s.padding;
            const int64_t up = (row / s.height * grad.height + y / s.stride) * grad.width;
            for (int64_t column = 0; column < s.width; column++) {
                const int64_t x = column + s.padding;
                const int64_t first = (y % s.stride * s.stride + x % s.stride) * s.channels;
                const int32_t pixel = int32_t(up + x / s.stride);
                const uint16_t* end = spikes.of(row, column + 1);
                for (const uint16_t* at = spikes.of(row, column); at < end; at++)
                    use(first + *at - column * s.channels, pixel);
            }
        }
    }
};

// Adds gradient rows at pixels, for TAPS kernel columns; `taps` has their sums, `apart` numbers
// apart, and the gradient of each lies one pixel before that of the one before it.
template <int TAPS>
void add_pixels(const int32_t* pixel, const int32_t* end, const float* grad, float* taps,
                int64_t apart) {
    Sums<float> total[TAPS][VECTORS];
    for (int tap = 0; tap < TAPS; tap++)
        std::memcpy(total[tap], taps + tap * apart, sizeof total[tap]);
    for (; pixel < end; pixel++)
        for (int tap = 0; tap < TAPS; tap++)
            for (int v = 0; v < VECTORS; v++)
                total[tap][v] +=
                    load<float, float>(grad + (int64_t(*pixel) - tap) * WIDTH + v * LANES);
    for (int tap = 0; tap < TAPS; tap++)
        std::memcpy(taps + tap * apart, total[tap], sizeof total[tap]);
}

// Input channels that one task adds up; its sums stay in the first-level cache.
constexpr int64_t CHANNELS = 8;

void weight_gradient(const Spikes& spikes, const float* grad, float* out, int threads) {
    const Sizes& s = spikes.s;
    const Framed framed(grad, s, threads);
    const ByChannel by(spikes, framed, threads);
    const int64_t groups = (s.channels + CHANNELS - 1) / CHANNELS, k = s.kernel;
    const int64_t pixels = s.images * framed.height * framed.width;
#pragma omp parallel num_threads(threads)
    {
        Aligned<float> sums(k * k * CHANNELS * WIDTH);  // [channel][ky][kx][output channel]
#pragma omp for schedule(static)
        for (int64_t task = 0; task < s.blocks() * groups; task++) {
            const int64_t block = task / groups, first = task % groups * CHANNELS;
            const int64_t last = std::min(s.channels, first + CHANNELS);
            std::fill(sums.data, sums.data + k * k * CHANNELS * WIDTH, 0.0f);
            for (int64_t strip = 0; strip < by.strips; strip++)
                for (int64_t c = first; c < last; c++)
                    for (int64_t ky = 0; ky < k; ky++)
                        for (int64_t kx = 0; kx < std::min(k, s.stride); kx++) {
                            const int64_t list = strip * by.lists(s) + c +
                                (ky % s.stride * s.stride + kx) * s.channels;
                            const int32_t* from = by.pixels.data() + by.starts[list];
                            const int32_t* end = by.pixels.data() + by.starts[list + 1];
                            const int64_t up = framed.before - ky / s.stride;
                            const float* at = framed.all.data +
                                (block * pixels + up * framed.width + framed.before) * WIDTH;
                            float* taps = sums.data + ((c - first) * k * k + ky * k + kx) * WIDTH;
                            const int64_t apart = s.stride * WIDTH;
                            switch ((k - kx + s.stride - 1) / s.stride) {
                                case 1: add_pixels<1>(from, end, at, taps, apart); break;
                                case 2: add_pixels<2>(from, end, at, taps, apart); break;
                                case 3: add_pixels<3>(from, end, at, taps, apart); break;
                            }
                        }
            const int64_t channel = block * WIDTH;
            for (int64_t o = 0; o < std::min(WIDTH, s.out_channels - channel); o++)
                for (int64_t i = 0; i < (last - first) * k * k; i++)
                    out[((channel + o) * s.channels + first) * k * k + i] += sums.data[i * WIDTH + o];
        }
    }
}

}  // namespace

#define FIND(name, X)                                                                          \
    extern "C" bool find_##name(const X* x, uint16_t* positions, int32_t* starts,              \
                                const Sizes* s, int threads) {                                 \
        return find(x, positions, starts, *s, threads);                                        \
    }
FIND(uint8, uint8_t)
FIND(float32, float)
FIND(bfloat16, bf16)

#define CONVOLVE(name, W, Y)                                                                   \
    extern "C" void lay_out_##name(const W* weight, W* laid, const Sizes* s, int threads) {    \
        lay_out(weight, laid, *s, threads);                                                    \
    }                                                                                          \
    extern "C" void forward_##name(const uint16_t* positions, const int32_t* starts,           \
                                   const W* laid, const Y* bias, Y* out, const Sizes* s,       \
                                   int threads) {                                              \
        forward(Spikes{positions, starts, *s}, laid, bias, out, threads);                      \
    }
CONVOLVE(float32, float, float)
CONVOLVE(bfloat16, bf16, bf16)
CONVOLVE(int8, int8_t, int32_t)

// Adds the weight gradient to `out`.
extern "C" void weight_gradient(const uint16_t* positions, const int32_t* starts,
                                const float* grad, float* out, const Sizes* s, int threads) {
    weight_gradient(Spikes{positions, starts, *s}, grad, out, threads);
}
