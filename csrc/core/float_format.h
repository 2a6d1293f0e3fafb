// Numbers that the functions of math.h are made of: how floats and doubles are stored, and coefficients.
#pragma once

#include <array>
#include <cstdint>

#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace math {

template <class S>
struct FloatFormat;

template <>
struct FloatFormat<float> {
    using UInt = std::uint32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr UInt exponent_bias = 127;
    static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    static constexpr UInt exponent_offset = 256;       // makes every exponent positive
    static constexpr float ln2_hi = 0.693359375f;      // 9 bits: n * ln2_hi is exact
    static constexpr float ln2_lo = -2.12194440e-4f;
    static constexpr float exp_min = -87.33654f;          // log of the smallest normal number
    static constexpr float exp_max = 88.37626f;           // 127.5 log 2: the last one whose scale 2^n is finite
    static constexpr float log_tiny_scale = 16777216.0f;  // 2^24 lifts a subnormal into the normal range
    static constexpr float log_tiny_exponent = 24;
    static constexpr int log_terms = 5;  // of the atanh series; the first term left out is below 2e-9
    // (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, highest power first: minimax, relative error of e^r 3.1e-9.
    static constexpr std::array exp_tail = {1.38145986467e-3f, 8.36871687973e-3f, 4.16683880453e-2f, 1.66665206317e-1f,
                                            4.99999934478e-1f};
    // (log(1 + x) / x - 1) / x for 0 <= x <= 1: minimax, relative error of log(1 + x) 5.2e-9.
    static constexpr std::array log1p_tail = {-3.31847459e-3f, 2.02045942e-2f,  -5.76644617e-2f,
                                              1.06805573e-1f,  -1.53553974e-1f, 1.96954009e-1f,
                                              -2.49585875e-1f, 3.33305113e-1f,  -4.99999328e-1f};
    static constexpr float ln2 = 0.69314718f;
    static constexpr std::array coarse_exp_tail = {8.31471526e-3f, 4.18902520e-2f, 1.66670898e-1f,
                                                   4.99992319e-1f};  // 1.1e-7
};

template <>
struct FloatFormat<double> {
    using UInt = std::uint64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr UInt exponent_bias = 1023;
    static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr UInt exponent_offset = 2048;
    static constexpr double ln2_hi = 0.693147180369123816490;  // low 21 bits are zero
    static constexpr double ln2_lo = 1.90821492927058770002e-10;
    static constexpr double exp_min = -708.39641853226408;
    static constexpr double exp_max = 709.43613930310391;          // 1023.5 log 2
    static constexpr double log_tiny_scale = 18014398509481984.0;  // 2^54
    static constexpr double log_tiny_exponent = 54;
    static constexpr int log_terms = 12;
    // Taylor, relative error of e^r 4e-18.
    static constexpr std::array exp_tail = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                            1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                            1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
};

}  // namespace math
}  // namespace FL_ISA
}  // namespace fused_losses
