// One register of floats or doubles of the instruction set this file is compiled for, as a type that the formulas of
// core/ and losses/ take in place of a scalar. GNU vector extensions, nothing left to the vectoriser; intrinsics only
// for what the extensions cannot say: estimates, bits of elements, parts of vectors and conversions (cpu/memory.h),
// transposition (cpu/transpose.h).
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push  // GCC 12's own undefined operands, bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/math.h"
#include "core/numeric.h"

namespace fused_losses {
inline namespace FL_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
struct Native;
template <>
struct Native<float> {
    typedef float Float __attribute__((vector_size(kVectorBytes)));
    typedef std::uint32_t UInt __attribute__((vector_size(kVectorBytes)));
    typedef std::int32_t Int __attribute__((vector_size(kVectorBytes)));
    typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Native<double> {
    typedef double Float __attribute__((vector_size(kVectorBytes)));
    typedef std::uint64_t UInt __attribute__((vector_size(kVectorBytes)));
    typedef std::int64_t Int __attribute__((vector_size(kVectorBytes)));
};

template <class A>
struct Mask {
    typename Native<A>::Int m;  // all ones or all zeros

    friend FL_ALWAYS_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
    friend FL_ALWAYS_INLINE Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
    FL_ALWAYS_INLINE Mask operator!() const { return {~m}; }
};

template <class A>
struct Vec {
    using Float = typename Native<A>::Float;
    static constexpr int size = kVectorBytes / sizeof(A);

    Float v;

    Vec() = default;
    FL_ALWAYS_INLINE Vec(A s) : v(s - Float{}) {}
    FL_ALWAYS_INLINE explicit Vec(Float native) : v(native) {}

    FL_ALWAYS_INLINE static Vec load(const A* from) {
        Vec x;
        std::memcpy(&x.v, from, sizeof(x.v));
        return x;
    }
    FL_ALWAYS_INLINE void store(A* to) const { std::memcpy(to, &v, sizeof(v)); }

    // 0, 1, 2, ...
    FL_ALWAYS_INLINE static Vec iota() {
        constexpr auto numbers = [] {
            std::array<A, size> n{};
            for (int i = 0; i < size; ++i) n[i] = A(i);
            return n;
        }();
        return load(numbers.data());
    }

    friend FL_ALWAYS_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
    friend FL_ALWAYS_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
    friend FL_ALWAYS_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
    friend FL_ALWAYS_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
    FL_ALWAYS_INLINE Vec operator-() const { return Vec(-v); }
    FL_ALWAYS_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }
    FL_ALWAYS_INLINE Vec& operator*=(Vec b) { return *this = *this * b; }

    friend FL_ALWAYS_INLINE Mask<A> operator<(Vec a, Vec b) { return {a.v < b.v}; }
    friend FL_ALWAYS_INLINE Mask<A> operator>(Vec a, Vec b) { return {a.v > b.v}; }
    friend FL_ALWAYS_INLINE Mask<A> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
    friend FL_ALWAYS_INLINE Mask<A> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
    friend FL_ALWAYS_INLINE Mask<A> operator==(Vec a, Vec b) { return {a.v == b.v}; }

    FL_ALWAYS_INLINE A sum() const {
        return fold(v, [](Float a, Float b) { return a + b; });
    }
    FL_ALWAYS_INLINE A max() const {
        return fold(v, [](Float a, Float b) { return b > a ? b : a; });
    }

private:
    // By halves, so that the order does not depend on the compiler.
    template <class Combine, int half = size / 2>
    FL_ALWAYS_INLINE static A fold(Float x, Combine combine) {
        if constexpr (half == 0)
            return x[0];
        else
            return fold<Combine, half / 2>(combine(x, swap<half>(x)), combine);
    }

    // Element i comes from i ^ distance.
    template <int distance>
    FL_ALWAYS_INLINE static Float swap(Float x) {
        using Index = std::conditional_t<sizeof(A) == 4, std::int32_t, std::int64_t>;
        constexpr auto partner = [] {
            std::array<Index, size> n{};
            for (int i = 0; i < size; ++i) n[i] = i ^ distance;
            return n;
        }();
        typename Native<A>::Int index;
        std::memcpy(&index, partner.data(), sizeof(index));
#if defined(__clang__)
        Float y;
        for (int i = 0; i < size; ++i) y[i] = x[partner[i]];
        return y;
#else
        return __builtin_shuffle(x, index);
#endif
    }
};

namespace math {

template <class A>
struct Traits<Vec<A>> {
    using Scalar = A;
    using Mask = fused_losses::Mask<A>;
    using Bits = typename Native<A>::UInt;

    FL_ALWAYS_INLINE static Bits bits(Vec<A> x) { return std::bit_cast<Bits>(x.v); }
    FL_ALWAYS_INLINE static Vec<A> from_bits(Bits x) { return Vec<A>(std::bit_cast<typename Vec<A>::Float>(x)); }
    FL_ALWAYS_INLINE static Vec<A> select(Mask condition, Vec<A> a, Vec<A> b) {
        return Vec<A>(condition.m ? a.v : b.v);
    }
    FL_ALWAYS_INLINE static Bits select(Mask condition, Bits a, Bits b) { return condition.m ? a : b; }
    FL_ALWAYS_INLINE static A first(Vec<A> x) { return x.v[0]; }

    // An estimate of 14 bits and a step of Newton's method take a quarter of the time of a division.
    FL_ALWAYS_INLINE static Vec<A> reciprocal(Vec<A> x) {
#if defined(__AVX512F__)
        if constexpr (sizeof(A) == 4) {
            const Vec<A> y(_mm512_rcp14_ps(x.v));
            return y + y * (Vec<A>(A(1)) - x * y);
        }
#endif
        return Vec<A>(A(1)) / x;
    }

    FL_ALWAYS_INLINE static Vec<A> rsqrt(Vec<A> x) {
#if defined(__AVX512F__)
        if constexpr (sizeof(A) == 4) {
            const Vec<A> y(_mm512_rsqrt14_ps(x.v));
            return y + y * (Vec<A>(A(0.5)) - Vec<A>(A(0.5)) * x * y * y);
        }
#endif
        return Vec<A>(A(1)) / sqrt(x);
    }

    FL_ALWAYS_INLINE static Vec<A> sqrt(Vec<A> x) {
        for (int i = 0; i < Vec<A>::size; ++i) x.v[i] = std::sqrt(x.v[i]);
        return x;
    }
};

}  // namespace math

// Room for a bit per element of a vector.
template <class A>
using VectorBits = std::conditional_t<(Vec<A>::size > 8), std::uint16_t, std::uint8_t>;

// One bit per element, the first the lowest: whether it is not 0. No element is -0.
template <class A>
FL_ALWAYS_INLINE VectorBits<A> nonzero_bits(Vec<A> x) {
#if defined(__AVX512F__)
    const auto bits = std::bit_cast<__m512i>(x.v);
    if constexpr (sizeof(A) == 4)
        return _mm512_test_epi32_mask(bits, bits);
    else
        return _mm512_test_epi64_mask(bits, bits);
#elif defined(__AVX__)
    if constexpr (sizeof(A) == 4)
        return _mm256_movemask_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    else
        return _mm256_movemask_pd(_mm256_cmp_pd(x.v, _mm256_setzero_pd(), _CMP_NEQ_UQ));
#else
    VectorBits<A> bits = 0;
    for (int i = 0; i < Vec<A>::size; ++i) bits |= VectorBits<A>(x.v[i] != A(0)) << i;
    return bits;
#endif
}

template <class A>
FL_ALWAYS_INLINE Mask<A> from_bits(VectorBits<A> bits) {
    constexpr auto bit = [] {
        std::array<A, Vec<A>::size> n{};
        for (int i = 0; i < Vec<A>::size; ++i)
            n[i] = std::bit_cast<A>(static_cast<typename math::FloatFormat<A>::UInt>(1) << i);
        return n;
    }();
    const auto of_element = math::Traits<Vec<A>>::bits(Vec<A>::load(bit.data()));
    return {(of_element & bits) != 0};
}

template <class A>
FL_ALWAYS_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {  // a where either is NaN
    return math::select(b > a, b, a);
}

// Wraps kFunction for callers outside of the kernels. A function with vectors as arguments may return with the upper
// halves of registers in use (GCC 12). From then on the SSE instructions of its callers, torch and Python, would wait
// for each other.
template <auto kFunction>
struct Entry;
template <class Result, class... Args, Result (*kFunction)(Args...)>
struct Entry<kFunction> {
    static Result call(Args... args) {
        const struct Clean {
            ~Clean() {
#if defined(__AVX__)
                _mm256_zeroupper();
#endif
            }
        } clean;
        return kFunction(args...);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
