// A block of rows as [classes][vector of rows]: every reduction over the classes is vertical. Rows whose classes are
// contiguous are transposed; NCHW pixels come as they are.
#pragma once

#include "cpu/row_buffer.h"
#include "cpu/tile_rows.h"
#include "cpu/transpose.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class VerticalBlock {
    using A = acc_t<Stored>;
    using V = Vec<A>;

public:
    static constexpr int kWidth = V::size;

    // Row r of `block` starts at source + r * row_stride. Lanes without a row read as zeros. Returns each row's largest
    // number.
    template <class Source>
    static V load_classes(const Source* source, std::int64_t row_stride, std::int64_t class_stride,
                          std::int64_t classes, int n, A* block) {
        if constexpr (std::is_same_v<A, float>)
            if (class_stride == 1 && classes <= Tiling::kVerticalClasses)
                return load_rows(source, row_stride, static_cast<int>(classes), n, block);
        for (std::int64_t c = 0; c < classes; ++c)
            load_class(source + c * class_stride, row_stride, n, block + c * kWidth, 0);
        return find_max(block, classes);
    }

    // One class of n rows, spread over blocks `block_size` apart.
    template <class Source>
    static void load_class(const Source* from, std::int64_t row_stride, int n, A* out, std::int64_t block_size) {
        for (; n >= kWidth; n -= kWidth, from += kWidth * row_stride, out += block_size)
            (row_stride == 1 ? load(from) : load_strided(from, row_stride)).store(out);
        for (int i = 0; i < kWidth && n > 0; ++i) out[i] = i < n ? widen(from[i * row_stride]) : A(0);
    }

    static V find_max(const A* block, std::int64_t classes) {
        constexpr A lowest = -std::numeric_limits<A>::infinity();
        V top = lowest, other = lowest;  // two chains: one would wait for each of its comparisons
        for (std::int64_t c = 0; c + 1 < classes; c += 2) {
            top = max(top, V::load(block + c * kWidth));
            other = max(other, V::load(block + (c + 1) * kWidth));
        }
        if (classes % 2) top = max(top, V::load(block + (classes - 1) * kWidth));
        return max(top, other);
    }

    // One class of n rows, no more than a vector.
    FL_ALWAYS_INLINE static void store_class(Stored* to, std::int64_t row_stride, int n, V x, bool past_caches) {
        if (n < kWidth)
            for (int i = 0; i < n; ++i) to[i * row_stride] = narrow<Stored>(x.v[i]);
        else if (past_caches)
            stream(to, x);
        else if (row_stride == 1)
            store(to, x);
        else
            store_strided(to, row_stride, x);
    }

    template <class Of>
    static void store_rows(Stored* grad, std::int64_t row_stride, int classes, int n, const A* block, Of of) {
        if constexpr (std::is_same_v<Stored, A>)
            if (!is_staged<Stored>(classes, n)) return columns_to_rows(block, row_stride, classes, grad, of);
        Staged staged;
        columns_to_rows(block, classes, classes, staged.rows, of);
        for_runs(row_stride, classes, n, [&](std::int64_t to, std::int64_t from, std::int64_t length) {
            for_vectors<A>(length, [&](std::int64_t i, auto count) {
                store_n(grad + to + i, load_n_or(staged.rows + from + i, count, A(0)), count);
            });
        });
    }

private:
    // Rows on their way to or from a transposition that cannot take them where they are: float16 and bfloat16, fewer
    // than kWidth rows, fewer than four classes (which it reads and writes past the last row).
    struct alignas(64) Staged {
        A rows[kWidth * Tiling::kVerticalClasses + 4];
    };

    template <class T>
    static bool is_staged(int classes, int n) {
        return !std::is_same_v<T, A> || n < kWidth || classes < 4;
    }

    template <class Source>
    static V load_rows(const Source* source, std::int64_t row_stride, int classes, int n, A* block) {
        if constexpr (std::is_same_v<Source, A>)
            if (!is_staged<Source>(classes, n)) return rows_to_columns(source, row_stride, classes, block);
        Staged staged;
        for_runs(row_stride, classes, n, [&](std::int64_t from, std::int64_t to, std::int64_t length) {
            RowBuffer<Stored>::widen_row(source + from, 1, length, staged.rows + to);
        });
        for (int i = n * classes; i < kWidth * classes + 4; ++i) staged.rows[i] = A(0);
        return rows_to_columns(staged.rows, classes, classes, block);
    }

    // Calls body(offset in memory, offset among the staged rows, length): row by row, or all at once if there are no
    // gaps.
    template <class Body>
    static void for_runs(std::int64_t row_stride, int classes, int n, Body body) {
        if (row_stride == classes) return body(0, 0, std::int64_t(n) * classes);
        for (int i = 0; i < n; ++i) body(i * row_stride, std::int64_t(i) * classes, classes);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
