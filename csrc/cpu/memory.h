// Vectors from and to memory in the dtype of the logits: whole, in part, in pairs, with gaps, past the caches.
#pragma once

#include <algorithm>

#include "cpu/vec.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
using vec_t = Vec<acc_t<Stored>>;

FL_ALWAYS_INLINE Vec<float> load(const float* from) { return Vec<float>::load(from); }
FL_ALWAYS_INLINE Vec<double> load(const double* from) { return Vec<double>::load(from); }
FL_ALWAYS_INLINE void store(float* to, Vec<float> x) { x.store(to); }
FL_ALWAYS_INLINE void store(double* to, Vec<double> x) { x.store(to); }

template <class Half16>
FL_ALWAYS_INLINE Vec<float> load(const Half16* from) {
    static_assert(sizeof(Half16) == 2);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Half16, Half>)
        return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    if constexpr (std::is_same_v<Half16, Half>)
        return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
    Native<float>::Half bits;
    std::memcpy(&bits, from, sizeof(bits));
    return widen_bits<Half16, Vec<float>>(__builtin_convertvector(bits, Native<float>::UInt));
}

template <class Half16>
FL_ALWAYS_INLINE Native<float>::Half narrowed(Vec<float> x) {
    static_assert(sizeof(Half16) == 2);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Half16, Half>)
        return std::bit_cast<Native<float>::Half>(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    if constexpr (std::is_same_v<Half16, Half>)
        return std::bit_cast<Native<float>::Half>(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
#endif
    return __builtin_convertvector(narrow_bits<Half16>(x), Native<float>::Half);
}

template <class Half16>
FL_ALWAYS_INLINE void store(Half16* to, Vec<float> x) {
    const auto bits = narrowed<Half16>(x);
    std::memcpy(to, &bits, sizeof(bits));
}

// A register full of 16-bit numbers as two vectors, in the order that takes the least work: of bfloat16, `first` has
// those in even places and `second` those in odd ones.
template <class Half16>
struct Pair {
    Vec<float> first, second;

    FL_ALWAYS_INLINE static Pair load(const Half16* from) {
        if constexpr (std::is_same_v<Half16, BFloat16>) {
            Native<float>::UInt bits;
            std::memcpy(&bits, from, sizeof(bits));
            return {widened_high_half(bits << 16), widened_high_half(bits & 0xffff0000u)};
        } else {
            return {fused_losses::load(from), fused_losses::load(from + Vec<float>::size)};
        }
    }

    // Rounds bfloat16 to nearest, halves away from zero: one operation where halves to even take four, for an error as
    // small. A NaN stays one unless all bits of its payload are set, which arithmetic never does by itself.
    FL_ALWAYS_INLINE void store(Half16* to) const {
        if constexpr (std::is_same_v<Half16, BFloat16>) {
            const auto rounded = [](Vec<float> x) FL_INLINE { return Traits::bits(x) + 0x8000u; };
            const Native<float>::UInt bits = rounded(first) >> 16 | (rounded(second) & 0xffff0000u);
            std::memcpy(to, &bits, sizeof(bits));
        } else {
            fused_losses::store(to, first);
            fused_losses::store(to + Vec<float>::size, second);
        }
    }

private:
    using Traits = math::Traits<Vec<float>>;

    FL_ALWAYS_INLINE static Vec<float> widened_high_half(Native<float>::UInt bits) { return Traits::from_bits(bits); }
};

// The largest of n >= kShorts 16-bit numbers. They are compared as integers, which puts them in order once the
// magnitude of negative ones is inverted. With a NaN among them the result may be any number.
typedef std::int16_t Shorts __attribute__((vector_size(kVectorBytes)));
constexpr std::int64_t kShorts = sizeof(Shorts) / sizeof(std::int16_t);

FL_ALWAYS_INLINE Shorts ordered(Shorts bits) {
    return bits ^ ((bits >> 15) & std::int16_t(0x7fff));
}  // its own inverse

template <class Half16>
FL_ALWAYS_INLINE float max_of(const Half16* x, std::int64_t n) {
    Shorts top = Shorts{} + std::int16_t(-0x8000);
    for (std::int64_t i = 0; i < n; i += kShorts) {
        Shorts bits;
        std::memcpy(&bits, x + std::min(i, n - kShorts), sizeof(bits));  // the last may overlap its predecessor
        const Shorts keys = ordered(bits);
        top = keys > top ? keys : top;
    }
    const Shorts bits = ordered(top);
    Half16 lane[kShorts];
    std::memcpy(lane, &bits, sizeof(bits));
    const auto pair = Pair<Half16>::load(lane);
    return max(pair.first, pair.second).max();
}

// ---- Partial vectors; the names are those of Highway ----

// True for the first n elements.
template <class A>
FL_ALWAYS_INLINE Mask<A> first_n(int n) {
    return Vec<A>::iota() < Vec<A>(A(n));
}

#if defined(__AVX512F__)
FL_ALWAYS_INLINE __mmask16 first_n_bits(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
#endif

// The first n elements; the others read as `fill`. No other memory is touched.
template <class Stored>
FL_ALWAYS_INLINE vec_t<Stored> load_n_or(const Stored* from, int n, acc_t<Stored> fill) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Stored, double>) {
        return Vec<double>(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(first_n_bits(n)), from));
    } else if constexpr (std::is_same_v<Stored, float>) {
        return Vec<float>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_n_bits(n), from));
    } else {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_n_bits(n), from));
        const Vec<float> x = widen_bits<Stored, Vec<float>>(std::bit_cast<Native<float>::UInt>(bits));
        return Vec<float>(_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_n_bits(n), x.v));
    }
#endif
    acc_t<Stored> lane[vec_t<Stored>::size];
    for (int i = 0; i < vec_t<Stored>::size; ++i) lane[i] = i < n ? widen(from[i]) : fill;
    return vec_t<Stored>::load(lane);
}

template <class Stored>
FL_ALWAYS_INLINE void store_n(Stored* to, vec_t<Stored> x, int n) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Stored, double>) {
        return _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_n_bits(n)), x.v);
    } else if constexpr (std::is_same_v<Stored, float>) {
        return _mm512_mask_storeu_ps(to, first_n_bits(n), x.v);
    } else {
        const __m512i bits = std::bit_cast<__m512i>(narrow_bits<Stored>(x));
        return _mm256_mask_storeu_epi16(to, first_n_bits(n), _mm512_cvtepi32_epi16(bits));
    }
#endif
    acc_t<Stored> lane[vec_t<Stored>::size];
    x.store(lane);
    for (int i = 0; i < n; ++i) to[i] = narrow<Stored>(lane[i]);
}

// A store that goes past the caches. `to` is aligned to its size; other threads may read it after stream_fence().
template <class Stored>
FL_ALWAYS_INLINE void stream(Stored* to, vec_t<Stored> x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<Stored, double>)
        _mm512_stream_pd(to, x.v);
    else if constexpr (std::is_same_v<Stored, float>)
        _mm512_stream_ps(to, x.v);
    else
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), std::bit_cast<__m256i>(narrowed<Stored>(x)));
#elif defined(__AVX__)
    if constexpr (std::is_same_v<Stored, double>)
        _mm256_stream_pd(to, x.v);
    else if constexpr (std::is_same_v<Stored, float>)
        _mm256_stream_ps(to, x.v);
    else
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), std::bit_cast<__m128i>(narrowed<Stored>(x)));
#else
    store(to, x);
#endif
}

FL_ALWAYS_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// One cache line, to which `to` is aligned.
constexpr std::int64_t kLine = 64;

FL_ALWAYS_INLINE void stream_line(void* to, const void* from) {
    constexpr int step = std::min<int>(kVectorBytes, kLine);
    for (int i = 0; i < kLine; i += step) {
        [[maybe_unused]] char* const t = static_cast<char*>(to) + i;
        [[maybe_unused]] const char* const f = static_cast<const char*>(from) + i;
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(t), _mm512_loadu_si512(f));
#elif defined(__AVX__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(t), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(f)));
#elif defined(__SSE2__)
        _mm_stream_si128(reinterpret_cast<__m128i*>(t), _mm_loadu_si128(reinterpret_cast<const __m128i*>(f)));
#else
        std::memcpy(t, f, step);
#endif
    }
}

// Whole cache lines to be stored past the caches, one at a time: the caller does other work in between.
struct Lines {
    char* to = nullptr;
    const char* from = nullptr;
    std::int64_t count = 0;

    FL_ALWAYS_INLINE void send_one() {
        if (count == 0) return;
        stream_line(to, from);
        to += kLine, from += kLine, --count;
    }
    FL_ALWAYS_INLINE void send_all() {
        while (count > 0) send_one();
    }
};

// Copies the elements at both ends that do not fill a cache line of `to`; returns the lines between, still to be sent.
template <class Stored>
FL_ALWAYS_INLINE Lines begin_stream(Stored* to, const Stored* from, std::int64_t n) {
    constexpr std::int64_t elements = kLine / sizeof(Stored);
    const auto misaligned = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine / sizeof(Stored));
    const std::int64_t head = std::min(n, (elements - misaligned) % elements), lines = (n - head) / elements;
    for (std::int64_t i = 0; i < head; ++i) to[i] = from[i];
    for (std::int64_t i = head + lines * elements; i < n; ++i) to[i] = from[i];
    return {reinterpret_cast<char*>(to + head), reinterpret_cast<const char*>(from + head), lines};
}

// The same functions for a whole vector, so that one loop body serves both.
struct Whole {};

template <class Stored>
FL_ALWAYS_INLINE vec_t<Stored> load_n_or(const Stored* from, Whole, acc_t<Stored>) {
    return load(from);
}

template <class Stored>
FL_ALWAYS_INLINE void store_n(Stored* to, vec_t<Stored> x, Whole) {
    store(to, x);
}

// Calls body(i) for each i in [0, n) as a constant: only arrays with such an index stay in registers.
template <int n, class Body>
FL_ALWAYS_INLINE void unrolled(Body body) {
    [&]<int... i>(std::integer_sequence<int, i...>)
        FL_INLINE { (body(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, n>{});
}

// Calls body(i, count) for every vector of [0, n): count is Whole, or the number of elements in the last one.
template <class A, class Body>
FL_ALWAYS_INLINE void for_vectors(std::int64_t n, Body body) {
    std::int64_t i = 0;
    for (; i + Vec<A>::size <= n; i += Vec<A>::size) body(i, Whole{});
    if (i < n) body(i, static_cast<int>(n - i));
}

// Calls body(begin, end) for numbers [0, n) in runs: one sum per run, then the sum of these, has a rounding error that
// does not grow with n.
template <class Body>
FL_ALWAYS_INLINE void for_runs(std::int64_t n, std::int64_t run, Body body) {
    for (std::int64_t begin = 0; begin < n; begin += run) body(begin, std::min(n, begin + run));
}
constexpr std::int64_t kVectorsPerRun = 256;

// Calls body(i, count, k) for the vectors of n numbers, as for_vectors does. Vector after vector goes to accumulator
// k = 0, 1, ..., kAhead - 1 (an integral_constant) and round again, so that an addition need not wait for the last one.
template <class A, int kAhead, class Body>
FL_ALWAYS_INLINE void for_vectors_ahead(std::int64_t n, Body body) {
    constexpr int size = Vec<A>::size;
    std::int64_t i = 0;
    for (; i + kAhead * size <= n; i += kAhead * size)
        unrolled<kAhead>([&](auto k) FL_INLINE { body(i + k * size, Whole{}, k); });
    constexpr std::integral_constant<int, 0> first;
    for_vectors<A>(n - i, [&](std::int64_t rest, auto count) { body(i + rest, count, first); });
}

// Elements `stride` apart.
template <class Stored>
FL_ALWAYS_INLINE vec_t<Stored> load_strided(const Stored* from, std::int64_t stride) {
    vec_t<Stored> x;
    for (int i = 0; i < vec_t<Stored>::size; ++i) x.v[i] = widen(from[i * stride]);
    return x;
}

template <class Stored>
FL_ALWAYS_INLINE void store_strided(Stored* to, std::int64_t stride, vec_t<Stored> x) {
    for (int i = 0; i < vec_t<Stored>::size; ++i) to[i * stride] = narrow<Stored>(x.v[i]);
}

}  // namespace FL_ISA
}  // namespace fused_losses
