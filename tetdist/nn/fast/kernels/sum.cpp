// The sum of all values of a dense tensor.

#include <algorithm>
#include <vector>

#include "types.h"

namespace {

// Values summed at a time in float32: exact for whole numbers up to 255.
constexpr int64_t BLOCK = 65536;

template <class X> double total(const X* x, int64_t count, int threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        Wide<X> sum = 0;
        const int64_t last = std::min(count, (b + 1) * BLOCK);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = b * BLOCK; i < last; i++) sum += wide(x[i]);
        sums[b] = sum;
    }
    double all = 0;
    for (double sum : sums) all += sum;
    return all;
}

}  // namespace

extern "C" void total_bfloat16(const bf16* x, int64_t count, double* out, int threads) {
    *out = total(x, count, threads);
}
