// The types of activations, and "wide", their compute type.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline int32_t wide(int32_t x) { return x; }
inline int32_t wide(uint8_t x) { return x; }
inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class X> using Wide = decltype(wide(X()));

template <class X> inline X narrow(Wide<X> x) {
    if constexpr (std::is_same_v<X, bf16>) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
        bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        return bf16{uint16_t(is_nan ? 0x7fc0 : rounded)};
    } else {
        return x;
    }
}

}  // namespace
