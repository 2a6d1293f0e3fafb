// Elementary functions for float and double that a compiler can vectorise: no branches, no tables, no library calls.
//
// On CUDA they are the standard functions. On the host the errors, measured over the whole range in tests/cpp, are
// below 2 ulp for exp, log and log1p, 4 ulp for expm1 (just above its switch to exp(x) - 1), and 2 + 2.6 |b log a| ulp
// for pow. exp flushes results below the smallest normal number to zero and overflows half a binade early (x > 88.37
// for float): softmax arguments are never positive.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace math {

template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
    using Int = std::int32_t;
    using UInt = std::uint32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr UInt exponent_bias = 127;
    static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    static constexpr float ln2_hi = 0.693359375f;      // 9 bits: n * ln2_hi is exact
    static constexpr float ln2_lo = -2.12194440e-4f;
    static constexpr float exp_min = -87.33654f;          // log of the smallest normal number
    static constexpr float exp_max = 88.37626f;           // 127.5 log 2: the last one whose scale 2^n is finite
    static constexpr float log_tiny_scale = 16777216.0f;  // 2^24 lifts a subnormal into the normal range
    static constexpr int log_tiny_exponent = 24;
    static constexpr int log_terms = 5;  // of the atanh series; the first term left out is below 2e-9
};

template <>
struct FloatFormat<double> {
    using Int = std::int64_t;
    using UInt = std::uint64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr UInt exponent_bias = 1023;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double ln2_hi = 0.693147180369123816490;  // low 21 bits are zero
    static constexpr double ln2_lo = 1.90821492927058770002e-10;
    static constexpr double exp_min = -708.39641853226408;
    static constexpr double exp_max = 709.43613930310391;          // 1023.5 log 2
    static constexpr double log_tiny_scale = 18014398509481984.0;  // 2^54
    static constexpr int log_tiny_exponent = 54;
    static constexpr int log_terms = 12;
};

// `condition ? a : b` that stays a selection. Compilers thread chains of conditional expressions into branches, and a
// loop with branches is not vectorised.
template <class T>
FL_HD T select(bool condition, T a, T b) {
#ifdef __CUDA_ARCH__
    return condition ? a : b;
#else
    using UInt = typename FloatFormat<T>::UInt;
    const UInt mask = UInt(0) - UInt(condition);
    return std::bit_cast<T>((std::bit_cast<UInt>(a) & mask) | (std::bit_cast<UInt>(b) & ~mask));
#endif
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2. float: minimax, relative error of e^r 3.1e-9; double: Taylor, 4e-18.
FL_HD float exp_tail(float r) {
    float p = 1.38145986467e-3f;
    p = p * r + 8.36871687973e-3f;
    p = p * r + 4.16683880453e-2f;
    p = p * r + 1.66665206317e-1f;
    return p * r + 4.99999934478e-1f;
}

FL_HD double exp_tail(double r) {
    double p = 1.0 / 6227020800.0;  // 1/13!
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    return p * r + 0.5;
}

template <class T>
FL_HD T exp(T x) {
#ifdef __CUDA_ARCH__
    return ::exp(x);
#else
    using F = FloatFormat<T>;
    using UInt = typename F::UInt;
    // x = n log 2 + r with |r| <= log(2) / 2. A NaN passes through r; the selects below leave it alone.
    const T shifted = x * T(1.4426950408889634) + F::round_magic;
    const T n = shifted - F::round_magic;
    const T r = (x - n * F::ln2_hi) - n * F::ln2_lo;
    const T mantissa = r * r * exp_tail(r) + r + T(1);
    const UInt scale = (std::bit_cast<UInt>(shifted) + F::exponent_bias) << F::mantissa_bits;
    const T y = mantissa * std::bit_cast<T>(scale);
    const T low = select(x < F::exp_min, T(0), y);
    return select(x > F::exp_max, std::numeric_limits<T>::infinity(), low);
#endif
}

template <class T>
FL_HD T expm1(T x) {
#ifdef __CUDA_ARCH__
    return ::expm1(x);
#else
    const T near_zero = x * x * exp_tail(x) + x;
    const T away = exp(x) - T(1);
    return select(x * x < T(0.1156), near_zero, away);
#endif
}

template <class T>
FL_HD T log(T x) {
#ifdef __CUDA_ARCH__
    return ::log(x);
#else
    using F = FloatFormat<T>;
    using Int = typename F::Int;
    using UInt = typename F::UInt;
    const bool tiny = x < std::numeric_limits<T>::min();
    const T y = x * select(tiny, F::log_tiny_scale, T(1));
    // y = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = f / (2 + f), f = m - 1.
    const UInt sqrt_half = std::bit_cast<UInt>(T(0.70710678118654752));
    const UInt bits = std::bit_cast<UInt>(y);
    const Int k = static_cast<Int>(bits - sqrt_half) >> F::mantissa_bits;
    const T f = std::bit_cast<T>(bits - (static_cast<UInt>(k) << F::mantissa_bits)) - T(1);
    const T s = f / (T(2) + f);
    const T z = s * s;
    T series = T(0);
    for (int i = F::log_terms; i >= 1; --i) series = z * (series + T(2) / T(2 * i + 1));
    // log(1 + f) = f - (f^2/2 - s (f^2/2 + series)): the leading term is exact.
    const T half_square = T(0.5) * f * f;
    const T exponent = T(k) - select(tiny, T(F::log_tiny_exponent), T(0));
    const T tail = half_square - (s * (half_square + series) + exponent * F::ln2_lo);
    const T finite = exponent * F::ln2_hi - (tail - f);
    const T or_infinite = select(x < std::numeric_limits<T>::infinity(), finite, x);  // +inf and NaN pass through
    const T or_pole = select(x == T(0), -std::numeric_limits<T>::infinity(), or_infinite);
    return select(x < T(0), std::numeric_limits<T>::quiet_NaN(), or_pole);
#endif
}

template <class T>
FL_HD T log1p(T x) {
#ifdef __CUDA_ARCH__
    return ::log1p(x);
#else
    // log(1 + x) = log u + (x - (u - 1)) / u: the second term returns what rounding u = 1 + x lost.
    const T u = T(1) + x;
    const T lost = x - (u - T(1));
    const bool exact = (u == T(0)) | (u == std::numeric_limits<T>::infinity());
    return log(u) + select(exact, T(0), lost / u);
#endif
}

// a >= 0; pow(0, 0) = 1.
template <class T>
FL_HD T pow(T a, T b) {
#ifdef __CUDA_ARCH__
    return ::pow(a, b);
#else
    return select(b == T(0), T(1), exp(b * log(a)));
#endif
}

}  // namespace math
}  // namespace FL_ISA
}  // namespace fused_losses
