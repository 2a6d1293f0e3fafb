// A block of rows as [classes][vector of rows]: every reduction over the classes is vertical. Rows whose classes are
// contiguous are transposed; NCHW pixels come as they are.
#pragma once

#include "cpu/row_buffer.h"
#include "cpu/tile_rows.h"
#include "cpu/transpose.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class LaneBlock {
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
            if (class_stride == 1 && classes <= Tiling::kFewClasses)
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

    // A tile's rows [first, first + n), blocks one after the other. Of pixels the whole tile class by class: runs of
    // memory instead of single vectors far apart. `rows` knows the targets; it gets their logits and the largest ones.
    static void load_tile(const RowProblem& p, std::int64_t outer, std::int64_t first, int n, TileRows<A>& rows,
                          A* tile) {
        const Stored* const source = as<Stored>(p.logits) + p.logits_stride.at(outer, first);
        const std::int64_t row_stride = p.logits_stride.inner, class_stride = p.logits_class_stride;
        const std::int64_t classes = p.num_classes, block_size = classes * kWidth;
        for (std::int64_t c = 0; c < classes && class_stride != 1; ++c)
            load_class(source + c * class_stride, row_stride, n, tile + c * kWidth, block_size);
        for (int b = 0; b < n; b += kWidth) {
            const int count = std::min(kWidth + 0, n - b);
            A* const block = tile + b * classes;
            const V top = class_stride == 1
                              ? load_classes(source + b * row_stride, row_stride, 1, classes, count, block)
                              : find_max(block, classes);
            top.store(rows.max + b);
            settle(p, rows, b, count, block);
        }
    }

    // What is stored is of(b)(x, c), where x is what the tile holds of class c and of the rows from b on.
    template <class Of>
    static void store_tile(const RowProblem& p, std::int64_t outer, std::int64_t first, int n, const A* tile, Of of) {
        Stored* const grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, first);
        const std::int64_t row_stride = p.grad_stride.inner, class_stride = p.grad_class_stride;
        const std::int64_t classes = p.num_classes;
        if constexpr (std::is_same_v<A, float>)
            if (class_stride == 1 && classes <= Tiling::kFewClasses) {
                for (int b = 0; b < n; b += kWidth)
                    store_rows(grad + b * row_stride, row_stride, static_cast<int>(classes),
                               std::min(kWidth + 0, n - b), tile + b * classes, of(b));
                return;
            }
        const bool past_caches = streams(p);
        for (std::int64_t c = 0; c < classes; ++c) {
            Stored* const to = grad + c * class_stride;
            const bool aligned = reinterpret_cast<std::uintptr_t>(to) % (kWidth * sizeof(Stored)) == 0;
            for (int b = 0; b < n; b += kWidth) {
                const V x = of(b)(V::load(tile + b * classes + c * kWidth), c);
                store_class(to + b * row_stride, row_stride, std::min(kWidth + 0, n - b), x, past_caches && aligned);
            }
        }
    }

    // Whether gradient rows are contiguous and many: ordinary stores would only read what they overwrite. Who stores
    // tiles then ends with a stream_fence().
    static bool streams(const RowProblem& p) {
        return p.grad && p.grad_stride.inner == 1 &&
               p.rows() * p.num_classes * std::int64_t(sizeof(Stored)) >= kStreamedBytes;
    }

private:
    static constexpr std::int64_t kStreamedBytes = 8 << 20;
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();

    // For logits of n rows, of which `rows` knows the targets at b: adds the bias, makes ignored rows zero so that they
    // stay finite, leaves the targets' logits in rows. What this changes may have been, or become, the largest.
    static void settle(const RowProblem& p, TileRows<A>& rows, int b, int n, A* block) {
        for (int i = 0; i < n && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(b + i); ++c) block[c * kWidth + i] = A(0);
        for (int i = 0; i < n && rows.bias != A(0); ++i) block[rows.target[b + i] * kWidth + i] += rows.bias;
        for (int i = 0; i < kWidth; ++i) rows.target_logit[b + i] = block[rows.target[b + i] * kWidth + i];
        if (rows.any_ignored || rows.bias != A(0)) find_max(block, p.num_classes).store(rows.max + b);
    }

    static V find_max(const A* block, std::int64_t classes) {
        V top = kLowest, other = kLowest;  // two chains: one would wait for each of its comparisons
        for (std::int64_t c = 0; c + 1 < classes; c += 2) {
            top = max(top, V::load(block + c * kWidth));
            other = max(other, V::load(block + (c + 1) * kWidth));
        }
        if (classes % 2) top = max(top, V::load(block + (classes - 1) * kWidth));
        return max(top, other);
    }

    // One class of n rows, no more than a vector.
    FL_HD static void store_class(Stored* to, std::int64_t row_stride, int n, V x, bool past_caches) {
        if (n < kWidth)
            for (int i = 0; i < n; ++i) to[i * row_stride] = narrow<Stored>(x.v[i]);
        else if (past_caches)
            stream(to, x);
        else if (row_stride == 1)
            store(to, x);
        else
            store_strided(to, row_stride, x);
    }

    // Rows on their way to or from a transposition that cannot take them where they are: float16 and bfloat16, fewer
    // than kWidth rows, fewer than four classes (which it reads and writes past the last row).
    struct alignas(64) Staged {
        A rows[kWidth * Tiling::kFewClasses + 4];
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

    template <class Of>
    static void store_rows(Stored* grad, std::int64_t row_stride, int classes, int n, const A* block, Of of) {
        if constexpr (std::is_same_v<Stored, A>)
            if (!is_staged<Stored>(classes, n)) return columns_to_rows(block, row_stride, classes, grad, of);
        Staged staged;
        columns_to_rows(block, classes, classes, staged.rows, of);
        for_runs(row_stride, classes, n, [&](std::int64_t to, std::int64_t from, std::int64_t length) {
            for_vectors<A>(length, [&](std::int64_t i, auto count) {
                store(grad + to + i, load(staged.rows + from + i, count, A(0)), count);
            });
        });
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
