// Neurons in integers for all timesteps, on a CPU, for native_integers.py. Each channel of each
// pixel takes, from currents a and b, after the decay m / 2^r,
//
//     v = (m * u >> r) + bias + (a << shift_a) + (b << shift_b)
//     n = number of thresholds that v exceeds
//     u = v - n * step, or without a step 0 if n > 0 else v

#include <algorithm>
#include <cstdint>

struct Neurons {
    const int32_t *a, *b;               // (T or 1, rows, channels); b may be missing
    const int32_t *bias, *thresholds;   // (channels), (levels, channels)
    const int32_t *step, *start;        // (channels) and (rows, channels), or missing
    uint8_t* spikes;                    // (T, rows, channels)
    int32_t* end;                       // (rows, channels)
    int64_t timesteps, rows, channels, levels;
    int64_t shared_a, shared_b;         // 1 if all timesteps share it
    int64_t shift_a, shift_b, factor, bits;
};

// One step of a row; no two of its arrays overlap, which the compiler cannot know.
void step(const Neurons& n, const int32_t* a, const int32_t* b, int32_t* u, uint8_t* spikes) {
    const int64_t channels = n.channels;
    if (n.factor == 1)  // A power of two needs no product of 64 bits.
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) u[c] = (u[c] >> n.bits) + n.bias[c];
    else
#pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            u[c] = int32_t(n.factor * u[c] >> n.bits) + n.bias[c];
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) u[c] += a[c] << n.shift_a;
    if (b)
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) u[c] += b[c] << n.shift_b;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) spikes[c] = u[c] > n.thresholds[c];
    for (int64_t level = 1; level < n.levels; level++)
#pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            spikes[c] += u[c] > n.thresholds[level * channels + c];
    if (n.step)
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) u[c] -= spikes[c] * n.step[c];
    else
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) u[c] = spikes[c] ? 0 : u[c];
}

extern "C" void fire(const Neurons* given, int threads) {
    const Neurons n = *given;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < n.rows; row++) {
        const int64_t at = row * n.channels;
        int32_t* u = n.end + at;
        if (n.start) std::copy(n.start + at, n.start + at + n.channels, u);
        else std::fill(u, u + n.channels, 0);
        for (int64_t t = 0; t < n.timesteps; t++) {
            const int64_t now = t * n.rows * n.channels + at;
            const int32_t* b = n.b ? n.b + (n.shared_b ? at : now) : nullptr;
            step(n, n.a + (n.shared_a ? at : now), b, u, n.spikes + now);
        }
    }
}
