// core/numeric.h: float16 and bfloat16 against the definition of the formats, in exact arithmetic.
#include "core/numeric.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "check.h"

namespace {

using namespace fused_losses;
using fused_losses_test::check;

template <class Stored>
struct Format;
template <>
struct Format<Half> {
    static constexpr const char* name = "Half";
    static constexpr int mantissa_bits = 10, exponent_bits = 5;
};
template <>
struct Format<BFloat16> {
    static constexpr const char* name = "BFloat16";
    static constexpr int mantissa_bits = 7, exponent_bits = 8;
};

// The number that sign, exponent and mantissa spell.
template <class Stored>
double decode(unsigned bits) {
    using F = Format<Stored>;
    constexpr int bias = (1 << (F::exponent_bits - 1)) - 1, top = (1 << F::exponent_bits) - 1;
    const int exponent = (bits >> F::mantissa_bits) & top;
    const int mantissa = bits & ((1 << F::mantissa_bits) - 1);
    const double sign = bits & 0x8000u ? -1.0 : 1.0;
    if (exponent == top) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - F::mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << F::mantissa_bits), exponent - bias - F::mantissa_bits);
}

// x rounded to the nearest number of the format, ties to even. Scaling by powers of two and nearbyint are exact.
template <class Stored>
double rounded(float x) {
    using F = Format<Stored>;
    constexpr int bias = (1 << (F::exponent_bits - 1)) - 1;
    if (x == 0 || !std::isfinite(x)) return x;
    const int quantum = std::max(std::ilogb(x), 1 - bias) - F::mantissa_bits;
    const double y = std::ldexp(std::nearbyint(std::ldexp(double(x), -quantum)), quantum);
    return std::fabs(y) >= std::ldexp(1.0, bias + 1) ? std::copysign(HUGE_VAL, y) : y;
}

template <class Stored>
void test_narrow(float x) {
    const Stored stored = narrow<Stored>(x);
    const double got = decode<Stored>(stored.bits), want = rounded<Stored>(x);
    const bool same = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
    check(same, "narrow<%s>(%.9g) = %.9g (0x%04x), not %.9g", Format<Stored>::name, double(x), got,
          unsigned(stored.bits), want);
}

// The number itself, the middle between it and the next one, and the floats beside both.
template <class Stored>
void test_all_patterns() {
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        const Stored stored{static_cast<std::uint16_t>(bits)};
        const float wide = widen(stored);
        const double want = decode<Stored>(bits);
        if (std::isnan(want)) {
            check(std::isnan(wide) && std::isnan(widen(narrow<Stored>(wide))), "%s 0x%04x is NaN", Format<Stored>::name,
                  bits);
            continue;
        }
        check(wide == want && std::signbit(wide) == std::signbit(want), "widen(%s 0x%04x) = %.9g, not %.9g",
              Format<Stored>::name, bits, double(wide), want);
        check(narrow<Stored>(wide).bits == bits, "narrow(widen(%s 0x%04x)) = 0x%04x", Format<Stored>::name, bits,
              unsigned(narrow<Stored>(wide).bits));
        if (std::isinf(want)) continue;
        // The larger neighbour, for the largest number the one that a longer exponent would give.
        const double next = 2 * want - decode<Stored>((bits & 0x7fffu) ? bits - 1 : bits | 1u);
        for (const float x : {wide, static_cast<float>((want + next) / 2)}) {
            test_narrow<Stored>(x);
            test_narrow<Stored>(std::nextafter(x, HUGE_VALF));
            test_narrow<Stored>(std::nextafter(x, -HUGE_VALF));
        }
    }
}

template <class Stored>
void test_stride(std::uint64_t stride) {
    for (std::uint64_t bits = 0; bits < (std::uint64_t(1) << 32); bits += stride)
        test_narrow<Stored>(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
    for (const std::uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0x7fffffffu, 0xffffffffu, 0x7f7fffffu})
        test_narrow<Stored>(std::bit_cast<float>(bits));
}

// Whole arrays, as the kernels convert them: the vectorised code must agree with the scalar one.
template <class Stored>
void test_arrays() {
    static float wide[0x10000];
    static Stored stored[0x10000], back[0x10000];
    for (unsigned i = 0; i < 0x10000u; ++i) stored[i].bits = static_cast<std::uint16_t>(i);
#pragma omp simd
    for (int i = 0; i < 0x10000; ++i) wide[i] = widen(stored[i]);
#pragma omp simd
    for (int i = 0; i < 0x10000; ++i) back[i] = narrow<Stored>(wide[i]);
    for (unsigned i = 0; i < 0x10000u; ++i) {
        const bool nan = std::isnan(decode<Stored>(i));
        check(nan ? std::isnan(wide[i]) && std::isnan(decode<Stored>(back[i].bits))
                  : wide[i] == decode<Stored>(i) && back[i].bits == i,
              "array of %s: 0x%04x comes back as 0x%04x", Format<Stored>::name, i, unsigned(back[i].bits));
    }
}

}  // namespace

int main(int argc, char** argv) {
    const auto stride = static_cast<std::uint64_t>(argc > 1 ? std::max(1, std::atoi(argv[1])) : 257);
    test_all_patterns<Half>();
    test_all_patterns<BFloat16>();
    test_arrays<Half>();
    test_arrays<BFloat16>();
    test_stride<Half>(stride);
    test_stride<BFloat16>(stride);
    check(widen(narrow<float>(1.1f)) == 1.1f && widen(narrow<double>(1.1)) == 1.1, "float and double stay as they are");
    return fused_losses_test::report("numeric.h");
}
