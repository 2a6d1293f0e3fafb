// How numbers are stored: the types of a dtype, the type arithmetic runs in, and float16 and bfloat16 to and from
// float.
#pragma once

#include <bit>
#include <cstdint>

#include "core/host_device.h"
#include "core/math.h"
#include "core/row_problem.h"

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

template <class T>
using bits_t = typename math::Traits<T>::Bits;

// Calls body.operator()<Stored>() for a dtype whose numbers are computed with as A.
template <class A, class Body>
FL_HD auto with_stored(Dtype dtype, Body body) {
    if constexpr (sizeof(A) == 8) {
        return body.template operator()<double>();
    } else {
        if (dtype == Dtype::kFloat32) return body.template operator()<float>();
        if (dtype == Dtype::kFloat16) return body.template operator()<Half>();
        return body.template operator()<BFloat16>();
    }
}

// The same for any dtype.
template <class Body>
FL_HD auto visit_dtype(Dtype dtype, Body body) {
    return dtype == Dtype::kFloat64 ? with_stored<double>(dtype, body) : with_stored<float>(dtype, body);
}

// Calls body.operator()<Index>() for a type of labels. A switch: where this is asked for each row, GCC copies the loop
// for each of several ifs.
template <class Body>
FL_HD auto visit_index_type(IndexType type, Body body) {
    switch (type) {
        case IndexType::kInt64: return body.template operator()<std::int64_t>();
        case IndexType::kInt32: return body.template operator()<std::int32_t>();
        case IndexType::kInt16: return body.template operator()<std::int16_t>();
        default: return body.template operator()<std::uint8_t>();
    }
}

// The number that the low 16 bits of `bits` stand for. T is float or a vector of floats.
template <class Stored, class T>
struct Convert;

template <class T>
struct Convert<BFloat16, T> {
    FL_HD static T widen(bits_t<T> bits) { return math::Traits<T>::from_bits(bits << 16); }

    // Round to nearest even: add half of the dropped part, less one unless the kept part is odd.
    FL_HD static bits_t<T> narrow(T x) {
        const bits_t<T> bits = math::Traits<T>::bits(x);
        const bits_t<T> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return math::Traits<T>::select(x == x, rounded, bits_t<T>{} + 0x7fc0u);
    }
};

template <class T>
struct Convert<Half, T> {
    using Traits = math::Traits<T>;
    using Bits = bits_t<T>;

    FL_HD static Bits all(std::uint32_t bits) { return Bits{} + bits; }

    // Shifting exponent and mantissa into place leaves the number too small by 2^112; the multiplication restores it,
    // subnormals included. Infinities and NaNs, whose exponent the multiplication leaves short, are set apart.
    FL_HD static T widen(Bits bits) {
        const Bits magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
        const T short_of = Traits::from_bits(magnitude);
        const Bits finite = Traits::bits(short_of * T(0x1p112f));
        const auto is_special = short_of >= Traits::from_bits(all(0x0f800000u));
        return Traits::from_bits(sign | Traits::select(is_special, magnitude | 0x7f800000u, finite));
    }

    FL_HD static Bits narrow(T x) {
        const Bits bits = Traits::bits(x);
        const Bits sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const T size = Traits::from_bits(magnitude);
        // Normal results: rebias the exponent by 112 and round as above.
        const Bits normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
        // Subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds it.
        const Bits subnormal = Traits::bits(size + T(0.5f)) - 0x3f000000u;
        const Bits finite = Traits::select(size < T(0x1p-14f), subnormal, normal);
        const Bits large = Traits::select(x == x, all(0x7c00u), all(0x7e00u));  // too large: infinity, or NaN
        return sign | Traits::select(size < T(65520.0f), finite, large);
    }
};

template <class Stored, class T>
FL_HD T widen_bits(bits_t<T> bits) {
    return Convert<Stored, T>::widen(bits);
}

template <class Stored, class T>
FL_HD bits_t<T> narrow_bits(T x) {
    return Convert<Stored, T>::narrow(x);
}

// exp of numbers that are not positive, with the digits that logits of type Stored have use for.
template <class Stored, class T>
FL_HD T exp_not_positive(T x) {
    if constexpr (sizeof(Stored) == 2)
        return math::coarse_exp_not_positive(x);
    else
        return math::exp_not_positive(x);
}

FL_HD float widen(float x) { return x; }
FL_HD double widen(double x) { return x; }
FL_HD float widen(Half x) { return widen_bits<Half, float>(x.bits); }
FL_HD float widen(BFloat16 x) { return widen_bits<BFloat16, float>(x.bits); }

template <class Stored>
FL_HD Stored narrow(acc_t<Stored> x) {
    return x;
}
template <>
FL_HD BFloat16 narrow<BFloat16>(float x) {
    return {static_cast<std::uint16_t>(narrow_bits<BFloat16>(x))};
}
template <>
FL_HD Half narrow<Half>(float x) {
    return {static_cast<std::uint16_t>(narrow_bits<Half>(x))};
}

}  // namespace FL_ISA
}  // namespace fused_losses
