// What the instructions of PTX do, for the C++ that translate.py makes of compiled kernels.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "approximate_instructions.h"
#include "cuda_compiled/memory.h"
#include "cuda_compiled/waiting.h"

using s8 = std::int8_t;
using s16 = std::int16_t;

struct f16 {};
struct bf16 {};

// A register of one type where another is asked for: the same bits, or the low ones, as wide as it is.
template <class To, class From>
To as(From x) {
    if constexpr (sizeof(To) == sizeof(From))
        return std::bit_cast<To>(x);
    else
        return static_cast<To>(x);
}

// ---- Integers ------------------------------------------------------------------------------------------------------

template <class T>
constexpr u32 kWidth = 8 * sizeof(T);

template <class T>
T min_of(T x, T y) {
    return y < x ? y : x;
}
template <class T>
T max_of(T x, T y) {
    return x < y ? y : x;
}
// A division by zero gives any number on the device, and ends a process here.
template <class T>
T div_of(T x, T y) {
    if (y == 0) return T(-1);
    return std::is_signed_v<T> && y == T(-1) ? T(-u64(x)) : T(x / y);
}
template <class T>
T rem_of(T x, T y) {
    return y == 0 ? x : T(u64(x) - u64(div_of(x, y)) * u64(y));
}
template <class T>
T shl_of(T x, u32 places) {
    return places < kWidth<T> ? T(x << places) : T(0);
}
template <class T>
T shr_of(T x, u32 places) {
    if (places >= kWidth<T>) return std::is_signed_v<T> ? T(x >> (kWidth<T> - 1)) : T(0);
    return T(x >> places);
}
template <class T>
T insert_bits(T from, T into, u32 begin, u32 count) {
    for (u32 i = 0; i < count && begin + i < kWidth<T>; ++i) {
        const T bit = T(1) << (begin + i);
        into = T((into & ~bit) | (from >> i & 1 ? bit : 0));
    }
    return into;
}
inline u32 permute(u32 low, u32 high, u32 selection) {
    const u64 all = u64(high) << 32 | low;
    u32 found = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 which = selection >> 4 * i & 15, byte = u32(all >> 8 * (which & 7)) & 255;
        found |= (which & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return found;
}

// ---- Floating point ------------------------------------------------------------------------------------------------

// Of two numbers that are equal, the larger one is +0. NaN only if both are.
template <class T>
T max_of_floats(T x, T y) {
    if (x != x || y != y) return x != x ? y : x;
    return x == y ? (std::signbit(x) ? y : x) : (x > y ? x : y);
}
template <class T>
T min_of_floats(T x, T y) {
    return -max_of_floats(-x, -y);
}
inline float max_or_nan(float x, float y) { return x != x || y != y ? x + y : max_of_floats(x, y); }
inline float saturated(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }

// Rounded down: what the sum of a double and its error says of the nearest number.
inline float fma_down(float a, float b, float c) {
    const float nearest = std::fma(a, b, c);
    if (!std::isfinite(nearest)) return nearest;
    const double product = double(a) * double(b), sum = product + double(c), part = sum - product;
    const double error = (product - (sum - part)) + (double(c) - part);
    return double(nearest) - sum > error ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}
inline float add_to_zero(float a, float b) {
    const float nearest = a + b;
    if (!std::isfinite(nearest)) return nearest;
    return std::fabs(nearest) > std::fabs(double(a) + double(b)) ? std::nextafter(nearest, 0.0f) : nearest;
}
// The upper half of the number.
inline double coarse_rcp(double x) {
    const double exact = 1 / x;
    return std::isfinite(exact) ? std::bit_cast<double>(std::bit_cast<u64>(exact) >> 32 << 32) : exact;
}

template <class Integer, class T>
Integer integer_of(T x) {
    constexpr Integer least = std::numeric_limits<Integer>::min(), most = std::numeric_limits<Integer>::max();
    if (x != x) return 0;
    return x <= T(least) ? least : x >= T(most) ? most : Integer(x);
}

template <class Half>
float widened(u16 x) {
    if constexpr (std::is_same_v<Half, f16>)
        return std::bit_cast<_Float16>(x);
    else
        return std::bit_cast<float>(u32(x) << 16);
}
template <class Half>
u16 narrowed(float x) {
    if (x != x) return 0x7fff;
    if constexpr (std::is_same_v<Half, f16>) return std::bit_cast<u16>(_Float16(x));
    const u32 bits = std::bit_cast<u32>(x);
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class Half>
u32 pair_of(float upper, float lower) {
    return u32(narrowed<Half>(upper)) << 16 | narrowed<Half>(lower);
}
template <class Half>
u32 max_of_pairs(u32 x, u32 y) {
    const auto larger = [&](int i) {
        return max_of_floats(widened<Half>(u16(x >> 16 * i)), widened<Half>(u16(y >> 16 * i)));
    };
    return pair_of<Half>(larger(1), larger(0));
}
