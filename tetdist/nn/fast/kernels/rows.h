// Division of rows into blocks for sums over rows.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Values in a block of rows, small enough for the second-level cache; and its maximum number of
// rows, since they are added one by one in float32 before double adds up the blocks.
constexpr int64_t BLOCK = 32768, MOST_ROWS = 256;

int64_t rows_of_block(int64_t channels) {
    return std::clamp<int64_t>(BLOCK / channels, 1, MOST_ROWS);
}

}  // namespace

extern "C" int64_t num_blocks(int64_t rows, int64_t channels) {
    const int64_t step = rows_of_block(channels);
    return (rows + step - 1) / step;
}
