// The device's approximate instructions. What a launch computes must hold however inexact they are, within what their
// maker says of them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace cuda_emulation {

inline bool is_inexact = false;  // whether they are off by as much as they may be

// Between -1 and 1, always the same for the same number.
inline double deviation(float x) {
    return is_inexact ? std::int32_t(std::bit_cast<std::uint32_t>(x) * 2654435761u) * 0x1p-31 : 0.0;
}

// Numbers that are not normal are 0.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// An exact result off by up to so many units of the last place.
inline float approximately(double exact, double of, float x) {
    if (exact == 0 || !std::isfinite(exact)) return static_cast<float>(exact);
    int exponent = 0;
    std::frexp(exact, &exponent);
    return flushed(static_cast<float>(exact + std::ldexp(of * deviation(x), exponent - 24)));
}

inline float exp2_approximately(float x) { return approximately(std::exp2(double(flushed(x))), 2, x); }
inline float rsqrt_approximately(float x) { return approximately(1.0 / std::sqrt(double(flushed(x))), 2, x); }
inline float reciprocal_approximately(float x) { return approximately(1.0 / double(flushed(x)), 1, x); }
inline float log2_approximately(float x) {
    const double exact = std::log2(double(flushed(x)));
    if (x >= 0.5f && x <= 2.0f) return static_cast<float>(exact + 0x1p-22 * deviation(x));
    return approximately(exact, 2, x);
}

}  // namespace cuda_emulation
