// A block of rows as [classes][vector of rows]: every reduction over the classes is vertical. Loading transposes rows
// whose classes are contiguous; NCHW pixels come as they are.
#pragma once

#include "cpu/tile_rows.h"
#include "cpu/vec.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class LaneBlock {
    using A = acc_t<Stored>;
    using V = Vec<A>;

public:
    static constexpr int kWidth = V::size;

    // Row r of `block` starts at source + r * row_stride. Lanes without a row read as zeros.
    template <class Source>
    static void load_classes(const Source* source, std::int64_t row_stride, std::int64_t class_stride,
                             std::int64_t classes, int n, A* block) {
        for (std::int64_t c = 0; c < classes; ++c) {
            const Source* from = source + c * class_stride;
            if (n < kWidth) {
                for (int i = 0; i < kWidth; ++i) block[c * kWidth + i] = i < n ? widen(from[i * row_stride]) : A(0);
            } else {
                (row_stride == 1 ? load(from) : load_strided(from, row_stride)).store(block + c * kWidth);
            }
        }
    }

    // The logits of rows [row, row + n), of which `rows` knows the targets at b: bias added, ignored rows zero so that
    // they stay finite. Leaves the targets' logits in rows.
    static void load_logits(const RowProblem& p, std::int64_t outer, std::int64_t row, TileRows<A>& rows, int b, int n,
                            A* block) {
        const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, row);
        load_classes(source, p.logits_stride.inner, p.logits_class_stride, p.num_classes, n, block);
        for (int i = 0; i < n && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored[b + i]; ++c) block[c * kWidth + i] = A(0);
        for (int i = 0; i < kWidth; ++i) {
            A& own = block[rows.target[b + i] * kWidth + i];
            own += i < n ? rows.bias : A(0);
            rows.target_logit[b + i] = own;
        }
    }

    static void store_gradient(const RowProblem& p, std::int64_t outer, std::int64_t row, int n, const A* block) {
        Stored* const grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, row);
        const std::int64_t row_stride = p.grad_stride.inner;
        for (std::int64_t c = 0; c < p.num_classes; ++c) {
            Stored* to = grad + c * p.grad_class_stride;
            const A* from = block + c * kWidth;
            if (n < kWidth) {
                for (int i = 0; i < n; ++i) to[i * row_stride] = narrow<Stored>(from[i]);
            } else if (row_stride == 1) {
                store(to, V::load(from));
            } else {
                store_strided(to, row_stride, V::load(from));
            }
        }
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
