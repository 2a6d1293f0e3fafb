// float16 and bfloat16 as storage: conversions to and from float that vectorise, and the type arithmetic runs in.
#pragma once

#include <bit>
#include <cstdint>

#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

template <class Stored>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
template <class Stored>
using acc_t = typename Accumulate<Stored>::type;

FL_HD float widen(float x) { return x; }
FL_HD double widen(double x) { return x; }
FL_HD float widen(BFloat16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }

// Shifting exponent and mantissa into place leaves the number too small by 2^112; the multiplication restores it,
// subnormals included. Infinities and NaNs, whose exponent the multiplication leaves short, are set apart.
FL_HD float widen(Half x) {
    const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fffu) << 13;
    const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
    const std::uint32_t special = magnitude | 0x7f800000u;
    const std::uint32_t finite = std::bit_cast<std::uint32_t>(scaled);
    return std::bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class Stored>
FL_HD Stored narrow(acc_t<Stored> x) {
    return x;
}

// Round to nearest even: add half of the dropped part, less one unless the kept part is odd.
template <>
FL_HD BFloat16 narrow<BFloat16>(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u)};
}

template <>
FL_HD Half narrow<Half>(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent by 112 and round as above.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds it.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u;
    const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const std::uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or too large: infinity
    return {static_cast<std::uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite))};
}

}  // namespace FL_ISA
}  // namespace fused_losses
