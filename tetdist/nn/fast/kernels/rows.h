// How rows are divided where one sums over them.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

// Numbers in a block of rows, which so stays in the second-level cache; and its most rows, since
// one adds them one after the other, in float32, before double takes the sums of blocks.
constexpr int64_t BLOCK = 32768, MOST_ROWS = 256;

int64_t rows_of_block(int64_t channels) {
    return std::clamp<int64_t>(BLOCK / channels, 1, MOST_ROWS);
}

}  // namespace

extern "C" int64_t num_blocks(int64_t rows, int64_t channels) {
    const int64_t step = rows_of_block(channels);
    return (rows + step - 1) / step;
}
