// Elementary functions that compile to branch-free arithmetic: no tables, no library calls. T is float, double or a
// vector of them (cpu/vec.h); S below is the type of its elements.
//
// On CUDA they are the standard functions. For the host every function states its Max Error, which tests/cpp measures
// over the Valid Range. Where no range is stated it is every number, infinities and NaN included.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/approximate.h"
#include "core/float_format.h"
#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace math {

// What arithmetic operators do not cover: the view as bits and the choice between two numbers.
template <class T>
struct Traits {
    using Scalar = T;
    using Mask = bool;
    using Bits = typename FloatFormat<T>::UInt;

    FL_HD static Bits bits(T x) { return std::bit_cast<Bits>(x); }
    FL_HD static T from_bits(Bits x) { return std::bit_cast<T>(x); }
    template <class U>
    FL_HD static U select(bool condition, U a, U b) {
        return condition ? a : b;
    }
    FL_HD static T first(T x) { return x; }
    FL_HD static T sqrt(T x) { return std::sqrt(x); }
#ifndef __CUDA_ARCH__
    FL_HD static T rsqrt(T x) { return T(1) / std::sqrt(x); }
    FL_HD static T reciprocal(T x) { return T(1) / x; }
#endif
};

template <class T>
using scalar_t = typename Traits<T>::Scalar;
template <class T>
using mask_t = typename Traits<T>::Mask;

// condition ? a : b, element by element.
template <class T>
FL_HD T select(mask_t<T> condition, T a, T b) {
    return Traits<T>::select(condition, a, b);
}

// The number that every element of x holds.
template <class T>
FL_HD scalar_t<T> to_scalar(T x) {
    return Traits<T>::first(x);
}

template <class S, std::size_t n, class T>
FL_HD T polynomial(const std::array<S, n>& coefficients, T r) {
    T p = T(coefficients[0]);
    for (std::size_t i = 1; i < n; ++i) p = p * r + T(coefficients[i]);
    return p;
}

template <class T>
FL_HD T exp_tail(T r) {
    constexpr auto coefficients = FloatFormat<scalar_t<T>>::exp_tail;  // a copy: CUDA has no place for the array itself
    return polynomial(coefficients, r);
}

// x = n log 2 + r with |r| <= log(2) / 2, as it is needed for 2^n e^r.
template <class T>
struct ReducedExponent {
    T n;
    typename Traits<T>::Bits shifted;  // the low bits are n + bias, the exponent field of 2^n

    FL_HD explicit ReducedExponent(T x) {
        using F = FloatFormat<scalar_t<T>>;
        constexpr auto magic = F::round_magic + scalar_t<T>(F::exponent_bias);
        const T sum = x * T(scalar_t<T>(1.4426950408889634)) + T(magic);
        n = sum - T(magic);
        shifted = Traits<T>::bits(sum);
    }

    // 2^n (1 + r + r^2 tail), 0 for x below the smallest that has a normal result. NaN passes through r.
    FL_HD T exp(T x, T r, T tail) const {
        using S = scalar_t<T>;
        using F = FloatFormat<S>;
        const T mantissa = (tail * r + T(S(1))) * r + T(S(1));
        const T y = mantissa * Traits<T>::from_bits(shifted << F::mantissa_bits);
        return select(x < T(F::exp_min), T(S(0)), y);
    }
};

// Their product, but 0 times anything is 0.
template <class T>
FL_HD T zero_at_zero(T factor, T x) {
    return select(factor == T(0), T(0), factor * x);
}

// The larger; NaN stays NaN.
template <class T>
FL_HD T at_least(T x, T least) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) return fused_losses::at_least(x, least);
#endif
    return select(x < least, least, x);
}

// exp of what a softmax takes it of: without the test for overflow. Results below the smallest normal number are 0.
// Max Error: 2 ulp; for floats on the device 2 + |x| / 22. Valid Range: x <= 0, NaN.
template <class T>
FL_HD T exp_not_positive(T x) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 8) {
        return ::exp(x);
    } else {
        // 2^t (1 + r): r is what t has lost by rounding. The exponential of -200 is 0.
        const T finite = at_least(x, -200.0f);
        const T t = finite * 1.44269504f, y = exp2_approximately(t);
        return ::fmaf(y, ::fmaf(t, -0.69314718f, finite), y);
    }
#else
    using F = FloatFormat<scalar_t<T>>;
    const ReducedExponent<T> reduced(x);
    const T r = (x - reduced.n * T(F::ln2_hi)) - reduced.n * T(F::ln2_lo);
    return reduced.exp(x, r, exp_tail(r));
#endif
}

// x exp(x) where exp(x) is known as exp_not_positive has it: 0 where that is.
template <class T>
FL_HD T times_exp(T x, T exp_x) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) return exp_x * at_least(x, -200.0f);
#endif
    return select(exp_x == T(0), T(0), exp_x * x);
}

// The same for less: enough where the logits and the gradient are numbers of 16 bits.
// Max Error: 3 + |x| ulp. Valid Range: x <= 0, NaN.
template <class T>
FL_HD T coarse_exp_not_positive(T x) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 8)
        return exp_not_positive(x);
    else
        return exp2_approximately(x * 1.44269504f);
#else
    using F = FloatFormat<scalar_t<T>>;
    if constexpr (sizeof(scalar_t<T>) == 8) {
        return exp_not_positive(x);
    } else {
        const ReducedExponent<T> reduced(x);
        const T r = x - reduced.n * T(F::ln2);
        constexpr auto coefficients = F::coarse_exp_tail;  // as in exp_tail
        return reduced.exp(x, r, polynomial(coefficients, r));
    }
#endif
}

template <bool kCoarse, class T>
FL_HD T exp_not_positive(T x) {
    return kCoarse ? coarse_exp_not_positive(x) : exp_not_positive(x);
}

// Results below the smallest normal number are 0. Overflow is half a binade early, beyond 88.37 (float), 709.43.
// Max Error: 2 ulp.
template <class T>
FL_HD T exp(T x) {
#ifdef __CUDA_ARCH__
    return ::exp(x);
#else
    using S = scalar_t<T>;
    const T finite = exp_not_positive(x);
    return select(x > T(FloatFormat<S>::exp_max), T(std::numeric_limits<S>::infinity()), finite);
#endif
}

// expm1(x) where exp(x) is known.
// Max Error: 5 ulp, just above the switch to exp(x) - 1, which is small against exp(x) there.
template <class T>
FL_HD T expm1_of(T x, T exp_x) {
    using S = scalar_t<T>;
    const T near_zero = x * x * exp_tail(x) + x;
    return select(x * x < T(S(0.1156)), near_zero, exp_x - T(S(1)));
}

// Max Error: 5 ulp.
template <class T>
FL_HD T expm1(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 8) return ::expm1(x);
#endif
    return expm1_of(x, exp(x));  // which is half as long on the device, too, where exp(x) is at hand
}

// Max Error: 2 ulp. Valid Range: from the smallest normal number to its inverse, NaN.
template <class T>
FL_HD T reciprocal(T x) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 8)
        return T(1) / x;
    else
        return reciprocal_approximately(x);
#else
    return Traits<T>::reciprocal(x);
#endif
}

// a / b, on the device to 2 ulp and without the branch for what is not normal.
// Valid Range: b, and so its inverse, normal, or +inf, NaN.
template <class T>
FL_HD T divide(T a, T b) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) return a * reciprocal_approximately(b);
#endif
    return a / b;
}

// b where a is NaN.
template <class T>
FL_HD T larger(T a, T b) {
#ifdef __CUDA_ARCH__
    return ::fmax(a, b);
#else
    return select(a > b, a, b);
#endif
}

// -|x|
template <class T>
FL_HD T minus_abs(T x) {
    return Traits<T>::from_bits(Traits<T>::bits(x) | Traits<T>::bits(T(-scalar_t<T>(0))));
}

// 1 / x, and 0 for x beyond 1e30. Valid Range: normal x > 0, +inf, NaN.
template <class T>
FL_HD T reciprocal_or_zero(T x) {
#ifdef FL_ON_DEVICE
    return reciprocal(x);  // that of +inf is 0
#else
    return select(x > T(1e30), T(0), reciprocal(x));
#endif
}

// Max Error: 0.5 ulp.
template <class T>
FL_HD T sqrt(T x) {
    return Traits<T>::sqrt(x);
}

// 1 / sqrt(x). Max Error: 3 ulp. Valid Range: normal x > 0.
template <class T>
FL_HD T rsqrt(T x) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 8)
        return T(1) / std::sqrt(x);
    else
        return rsqrt_approximately(x);
#else
    return Traits<T>::rsqrt(x);
#endif
}

// log y + log_scale * log 2. Valid Range: normal y > 0.
template <class T>
FL_HD T scaled_log(T y, T log_scale) {
    using S = scalar_t<T>;
    using F = FloatFormat<S>;
    using UInt = typename F::UInt;
    // y = 2^k m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = f / (2 + f), f = m - 1.
    constexpr UInt sqrt_half = std::bit_cast<UInt>(S(0.70710678118654752));
    constexpr UInt exponent_mask = ~UInt(0) << F::mantissa_bits;
    const auto from_sqrt_half = Traits<T>::bits(y) - sqrt_half;
    const T f = Traits<T>::from_bits(Traits<T>::bits(y) - (from_sqrt_half & exponent_mask)) - T(S(1));
    const T s = f / (T(S(2)) + f);
    const T z = s * s;
    T series = T(S(0));
    for (int i = F::log_terms; i >= 1; --i) series = z * (series + T(S(2) / S(2 * i + 1)));
    // k as a floating point number without a conversion from signed integers, which older processors lack for double.
    constexpr UInt magic = std::bit_cast<UInt>(F::round_magic);
    const auto positive = (from_sqrt_half + (F::exponent_offset << F::mantissa_bits)) >> F::mantissa_bits;
    const T k = Traits<T>::from_bits(positive + magic) - T(F::round_magic + S(F::exponent_offset));
    const T exponent = k + log_scale;
    // log(1 + f) = f - (f^2/2 - s (f^2/2 + series)): the leading term is exact.
    const T half_square = T(S(0.5)) * f * f;
    const T tail = half_square - (s * (half_square + series) + exponent * T(F::ln2_lo));
    return exponent * T(F::ln2_hi) - (tail - f);
}

// The same bits as log(x), for what sums of a softmax are.
// Max Error: 2 ulp. Valid Range: normal x > 0, +inf, NaN.
template <class T>
FL_HD T log_normal(T x) {
#ifdef __CUDA_ARCH__
    return ::log(x);
#else
    using S = scalar_t<T>;
    return select(x < T(std::numeric_limits<S>::infinity()), scaled_log(x, T(S(0))), x);
#endif
}

// Max Error: 2 ulp.
template <class T>
FL_HD T log(T x) {
#ifdef __CUDA_ARCH__
    return ::log(x);
#else
    using S = scalar_t<T>;
    using F = FloatFormat<S>;
    constexpr S infinity = std::numeric_limits<S>::infinity();
    const auto tiny = x < T(std::numeric_limits<S>::min());
    const T y = x * select(tiny, T(F::log_tiny_scale), T(S(1)));
    const T finite = scaled_log(y, select(tiny, T(-F::log_tiny_exponent), T(S(0))));
    const T or_infinite = select(x < T(infinity), finite, x);  // +inf and NaN pass through
    const T or_pole = select(x == T(S(0)), T(-infinity), or_infinite);
    return select(x < T(S(0)), T(std::numeric_limits<S>::quiet_NaN()), or_pole);
#endif
}

// Max Error: 2 ulp.
template <class T>
FL_HD T log1p(T x) {
#ifdef __CUDA_ARCH__
    return ::log1p(x);
#else
    using S = scalar_t<T>;
    // log(1 + x) = log u + (x - (u - 1)) / u: the second term returns what rounding u = 1 + x lost.
    const T u = T(S(1)) + x;
    const T lost = x - (u - T(S(1)));
    const auto exact = (u == T(S(0))) | (u == T(std::numeric_limits<S>::infinity()));
    return log(u) + select(exact, T(S(0)), lost / u);
#endif
}

// log of a sum of exponentials, of which one at least is hardly below 1: the error that matters is that in sums near 1,
// which is no larger than the sum's own rounding. kCoarse: logits and gradient are numbers of 16 bits.
template <bool kCoarse, class T>
FL_HD T log_of_sum(T x) {
#ifdef FL_ON_DEVICE
    if constexpr (kCoarse && sizeof(T) == 4) return log2_approximately(x) * 0.69314718f;
#endif
    return log(x);
}

// log(1 + x) / x, 1 at 0.
// Max Error: 3 ulp. Valid Range: 0 <= x <= 1, NaN.
template <class T>
FL_HD T log1p_over(T x) {
    using S = scalar_t<T>;
    if constexpr (sizeof(S) == 4) {
        constexpr auto tail = FloatFormat<S>::log1p_tail;  // as in exp_tail
        return polynomial(tail, x) * x + T(S(1));
    } else {  // 2 atanh(a), a at most 1/3
        const T of = T(S(1)) / (T(S(2)) + x), a = x * of;
        T tail = T(S(0));
        for (int i = 17; i >= 1; --i) tail = a * a * (tail + T(S(2) / S(2 * i + 1)));
        return of * (T(S(2)) + tail);
    }
}

// log(x) where x - 1 is known by itself, with digits that x has lost if it is near 1.
// Max Error: 3 ulp, for floats on the device 10. Valid Range: normal x > 0, 0, NaN.
template <class T>
FL_HD T log_near_one(T x, T x_minus_1) {
    using S = scalar_t<T>;
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) {
        // Of a number near 1, 2 atanh(s); the last term stands for those behind it, too. The instruction is exact to a
        // part of 1 there.
        const T s = divide(x_minus_1, x_minus_1 + T(2)), z = s * s;
        const T near = T(2) * s * (((T(0.1456f) * z + T(0.2f)) * z + T(1.0f / 3)) * z + T(1));
        return std::fabs(x_minus_1) < T(0.3f) ? near : T(0.69314718f) * log2_approximately(x);
    }
#endif
    const T lost = x_minus_1 - (x - T(S(1)));
    // Far from 1 it is x that has the digits.
    return log(x) + select((x > T(S(0.5))) & (x < T(S(2))), divide(lost, x), T(S(0)));
}

// 0 for x < 0; NaN stays.
template <class T>
FL_HD T not_negative(T x) {
    return at_least(x, T(0));
}

}  // namespace math
}  // namespace FL_ISA
}  // namespace fused_losses
