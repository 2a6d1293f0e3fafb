// A tile of rows as blocks (vertical_block.h), one after the other, with the logits of all its rows.
#pragma once

#include "cpu/scratch.h"
#include "cpu/vertical_block.h"

namespace fused_losses {
inline namespace FL_ISA {

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
            const int count = std::min(kWidth + 0, n - b);
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
        Stored* const grad = gradient_at<Stored>(p, outer, first);
        const std::int64_t row_stride = p.grad_stride.inner, class_stride = p.grad_class_stride;
        const std::int64_t classes = p.num_classes;
        const A* const tile = block(0);
        const bool past_caches = streams;
        if constexpr (std::is_same_v<A, float>)
            if (class_stride == 1 && classes <= Tiling::kVerticalClasses) {
                for (int b = 0; b < n; b += kWidth)
                    Block::store_rows(grad + b * row_stride, row_stride, static_cast<int>(classes),
                                      std::min(kWidth + 0, n - b), tile + b * classes, of(b));
                return;
            }
        for (std::int64_t c = 0; c < classes; ++c) {
            Stored* const to = grad + c * class_stride;
            const bool aligned = reinterpret_cast<std::uintptr_t>(to) % (kWidth * sizeof(Stored)) == 0;
            for (int b = 0; b < n; b += kWidth) {
                const V x = of(b)(V::load(tile + b * classes + c * kWidth), c);
                Block::store_class(to + b * row_stride, row_stride, std::min(kWidth + 0, n - b), x,
                                   past_caches && aligned);
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
        if (rows.any_ignored || rows.bias != A(0)) Block::find_max(z, p.num_classes).store(rows.max + b);
    }

    const Scratch<A> logits;
    const bool streams;
};

}  // namespace FL_ISA
}  // namespace fused_losses
