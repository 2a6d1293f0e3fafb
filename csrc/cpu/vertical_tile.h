// Vertical tiles: rows in blocks [classes][vector of rows], so that every reduction over the classes is vertical. Rows
// whose classes are contiguous are transposed; NCHW pixels come as they are.
#pragma once

#include "cpu/row_buffer.h"
#include "cpu/scratch.h"
#include "cpu/transpose.h"

namespace fused_losses {
inline namespace FL_ISA {

// How a block is read and written in the dtype of the logits.
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
        V top = lowest, other = lowest;  // two chains, as each comparison waits for the last of its chain
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

// A tile's blocks, one after the other, with the logits of all its rows.
template <class A>
class VerticalTile {
    using V = Vec<A>;
    static constexpr int kWidth = V::size;
    static constexpr std::int64_t kStreamedBytes = 8 << 20;

public:
    VerticalTile(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          logits(problem.num_classes * tile_rows),
          // Gradient rows that are contiguous and many: ordinary stores would only read what they overwrite.
          streams(p.grad && p.grad_stride.inner == 1 &&
                  p.rows() * p.num_classes * bytes_of(p.dtype) >= kStreamedBytes) {}

    ~VerticalTile() {
        if (streams) stream_fence();
    }

    // Of the vector of rows from the tile's row b on.
    A* block(int b) const { return logits.data() + b * p.num_classes; }

    // Reads rows [first, first + n) of image `outer`, for which rows.begin has been called. Of pixels it reads the
    // whole tile class by class: runs of memory instead of single vectors far apart.
    template <class Stored>
    void load_logits(std::int64_t outer, std::int64_t first, int n) {
        using Block = VerticalBlock<Stored>;
        const Stored* const source = logits_at<Stored>(p, outer, first);
        const std::int64_t row_stride = p.logits_stride.inner, class_stride = p.logits_class_stride;
        const std::int64_t classes = p.num_classes;
        for (std::int64_t c = 0; c < classes && class_stride != 1; ++c)
            Block::load_class(source + c * class_stride, row_stride, n, block(0) + c * kWidth, classes * kWidth);
        for (int b = 0; b < n; b += kWidth) {
            const int count = std::min(kWidth, n - b);
            const V max = class_stride == 1
                              ? Block::load_classes(source + b * row_stride, row_stride, 1, classes, count, block(b))
                              : Block::find_max(block(b), classes);
            max.store(rows.max + b);
            apply_bias_and_ignore<Block>(b, count);
        }
    }

    // What is stored is of(b)(x, c), where x is what the tile holds of class c and of the rows from b on.
    template <class Stored, class Of>
    void store_gradient(std::int64_t outer, std::int64_t first, int n, Of of) const {
        using Block = VerticalBlock<Stored>;
        Stored* const grad = grad_at<Stored>(p, outer, first);
        const std::int64_t row_stride = p.grad_stride.inner, class_stride = p.grad_class_stride;
        const std::int64_t classes = p.num_classes;
        const A* const tile = block(0);
        const bool past_caches = streams;
        if constexpr (std::is_same_v<A, float>)
            if (class_stride == 1 && classes <= Tiling::kVerticalClasses) {
                for (int b = 0; b < n; b += kWidth)
                    Block::store_rows(grad + b * row_stride, row_stride, static_cast<int>(classes),
                                      std::min(kWidth, n - b), tile + b * classes, of(b));
                return;
            }
        for (std::int64_t c = 0; c < classes; ++c) {
            Stored* const to = grad + c * class_stride;
            const bool aligned = reinterpret_cast<std::uintptr_t>(to) % (kWidth * sizeof(Stored)) == 0;
            for (int b = 0; b < n; b += kWidth) {
                const V x = of(b)(V::load(tile + b * classes + c * kWidth), c);
                Block::store_class(to + b * row_stride, row_stride, std::min(kWidth, n - b), x, past_caches && aligned);
            }
        }
    }

    const RowProblem& p;
    TileRows<A> rows;

private:
    // Rows [b, b + n): adds the bias, makes ignored rows zero so that they stay finite, and finds the targets' logits.
    // The number that changes may have been the row's largest, or become it.
    template <class Block>
    void apply_bias_and_ignore(int b, int n) {
        A* const z = block(b);
        for (int i = 0; i < n && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(b + i); ++c) z[c * kWidth + i] = A(0);
        for (int i = 0; i < n && rows.bias != A(0); ++i) z[rows.target[b + i] * kWidth + i] += rows.bias;
        for (int i = 0; i < kWidth; ++i) rows.target_logit[b + i] = z[rows.target[b + i] * kWidth + i];
        for (int i = 0; i < kWidth && p.other_target; ++i)
            rows.other_logit[b + i] = z[rows.other_target[b + i] * kWidth + i];
        if (rows.any_ignored || rows.bias != A(0)) Block::find_max(z, p.num_classes).store(rows.max + b);
    }

    const Scratch<A> logits;
    const bool streams;
};

}  // namespace FL_ISA
}  // namespace fused_losses
