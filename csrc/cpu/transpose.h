// Rows of floats in memory to one vector per column and back: element i of a vector belongs to row i. It goes by four
// columns, so that every access has 16 bytes, and loads and stores alone move numbers between 16-byte lanes.
#pragma once

#include "cpu/memory.h"

namespace fused_losses {
inline namespace FL_ISA {

struct FourColumns {
    Vec<float> v[4];
};

#if defined(__x86_64__)

// Vectors of rows 4L + i in 16-byte lane L.
#if defined(__AVX512F__)
using Quads = __m512;
FL_ALWAYS_INLINE Quads load_quads(const float* from, std::int64_t stride) {
    Quads x = _mm512_castps128_ps512(_mm_loadu_ps(from));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 4 * stride), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 8 * stride), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(from + 12 * stride), 3);
}
template <int lane>
FL_ALWAYS_INLINE __m128 quad(Quads x) {
    return _mm512_extractf32x4_ps(x, lane);
}
FL_ALWAYS_INLINE Quads interleave_low(Quads a, Quads b) { return _mm512_unpacklo_ps(a, b); }
FL_ALWAYS_INLINE Quads interleave_high(Quads a, Quads b) { return _mm512_unpackhi_ps(a, b); }
FL_ALWAYS_INLINE Quads low_pairs(Quads a, Quads b) { return _mm512_shuffle_ps(a, b, 0x44); }
FL_ALWAYS_INLINE Quads high_pairs(Quads a, Quads b) { return _mm512_shuffle_ps(a, b, 0xee); }
#elif defined(__AVX__)
using Quads = __m256;
FL_ALWAYS_INLINE Quads load_quads(const float* from, std::int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * stride), 1);
}
template <int lane>
FL_ALWAYS_INLINE __m128 quad(Quads x) {
    return _mm256_extractf128_ps(x, lane);
}
FL_ALWAYS_INLINE Quads interleave_low(Quads a, Quads b) { return _mm256_unpacklo_ps(a, b); }
FL_ALWAYS_INLINE Quads interleave_high(Quads a, Quads b) { return _mm256_unpackhi_ps(a, b); }
FL_ALWAYS_INLINE Quads low_pairs(Quads a, Quads b) { return _mm256_shuffle_ps(a, b, 0x44); }
FL_ALWAYS_INLINE Quads high_pairs(Quads a, Quads b) { return _mm256_shuffle_ps(a, b, 0xee); }
#else
using Quads = __m128;
FL_ALWAYS_INLINE Quads load_quads(const float* from, std::int64_t) { return _mm_loadu_ps(from); }
template <int lane>
FL_ALWAYS_INLINE __m128 quad(Quads x) {
    return x;
}
FL_ALWAYS_INLINE Quads interleave_low(Quads a, Quads b) { return _mm_unpacklo_ps(a, b); }
FL_ALWAYS_INLINE Quads interleave_high(Quads a, Quads b) { return _mm_unpackhi_ps(a, b); }
FL_ALWAYS_INLINE Quads low_pairs(Quads a, Quads b) { return _mm_shuffle_ps(a, b, 0x44); }
FL_ALWAYS_INLINE Quads high_pairs(Quads a, Quads b) { return _mm_shuffle_ps(a, b, 0xee); }
#endif

// Transposes the 4x4 numbers of each lane; its own inverse.
FL_ALWAYS_INLINE void transpose_lanes(Quads (&x)[4]) {
    const Quads low01 = interleave_low(x[0], x[1]), high01 = interleave_high(x[0], x[1]);
    const Quads low23 = interleave_low(x[2], x[3]), high23 = interleave_high(x[2], x[3]);
    x[0] = low_pairs(low01, low23);
    x[1] = high_pairs(low01, low23);
    x[2] = low_pairs(high01, high23);
    x[3] = high_pairs(high01, high23);
}

// FourColumns 0 to 3 of Vec<float>::size rows.
FL_ALWAYS_INLINE FourColumns load_columns(const float* from, std::int64_t stride) {
    Quads x[4];
    for (int i = 0; i < 4; ++i) x[i] = load_quads(from + i * stride, stride);
    transpose_lanes(x);
    return {{Vec<float>(x[0]), Vec<float>(x[1]), Vec<float>(x[2]), Vec<float>(x[3])}};
}

// In the order of the rows: where they overlap (fewer than four columns), the next row covers what does not belong.
FL_ALWAYS_INLINE void store_columns(float* to, std::int64_t stride, const FourColumns& columns) {
    Quads x[4];
    for (int i = 0; i < 4; ++i) x[i] = columns.v[i].v;
    transpose_lanes(x);
    [&]<int... lane>(std::integer_sequence<int, lane...>) {
        const auto store_lane = [&]<int l>(std::integral_constant<int, l>) {
            for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + (4 * l + i) * stride, quad<l>(x[i]));
        };
        (store_lane(std::integral_constant<int, lane>{}), ...);
    }(std::make_integer_sequence<int, Vec<float>::size / 4>{});
}

#else  // any other processor

FL_ALWAYS_INLINE FourColumns load_columns(const float* from, std::int64_t stride) {
    FourColumns columns;
    for (int i = 0; i < 4; ++i) columns.v[i] = load_strided(from + i, stride);
    return columns;
}

FL_ALWAYS_INLINE void store_columns(float* to, std::int64_t stride, const FourColumns& columns) {
    for (int r = 0; r < Vec<float>::size; ++r)
        for (int i = 0; i < 4; ++i) to[r * stride + i] = columns.v[i].v[r];
}

#endif

// Vec<float>::size rows of n columns to [n][row] and back. With fewer than four columns a row is read and written up
// to its fourth, so that there must be room behind the last.

// Returns each row's largest number.
FL_ALWAYS_INLINE Vec<float> rows_to_columns(const float* rows, std::int64_t stride, int n, float* columns) {
    constexpr int size = Vec<float>::size;
    Vec<float> top = -std::numeric_limits<float>::infinity();
    for (int c = 0; c < n; c += 4) {
        const int from = c + 4 <= n || n < 4 ? c : n - 4;  // the last four overlap their predecessors
        const FourColumns four = load_columns(rows + from, stride);
        unrolled<4>([&](auto i) FL_INLINE {
            if (i >= n) return;
            four.v[i].store(columns + (from + i) * size);
            top = max(top, four.v[i]);
        });
    }
    return top;
}

// What is stored is of(x, c), where x is column c.
template <class Of>
FL_ALWAYS_INLINE void columns_to_rows(const float* columns, std::int64_t stride, int n, float* rows, Of of) {
    constexpr int size = Vec<float>::size;
    for (int c = 0; c < n; c += 4) {
        const int from = c + 4 <= n || n < 4 ? c : n - 4;
        FourColumns four;
        for (int i = 0; i < 4; ++i) {
            const int column = from + (i < n ? i : 0);
            four.v[i] = of(Vec<float>::load(columns + column * size), column);
        }
        store_columns(rows + from, stride, four);
    }
}

}  // namespace FL_ISA
}  // namespace fused_losses
