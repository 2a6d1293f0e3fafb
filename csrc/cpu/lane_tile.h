// Softmax losses on blocks of rows (lane_block.h): few classes, and NCHW.
#pragma once

#include "cpu/lane_block.h"
#include "cpu/scratch.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class LaneTile {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    using Block = LaneBlock<Stored>;
    static constexpr int kWidth = V::size;
    static constexpr int kBlocks = Tiling::kLanes / kWidth;

public:
    explicit LaneTile(const RowProblem& problem)
        : p(problem),
          classes(problem.num_classes),
          block_size(problem.num_classes * kWidth),
          x_store(block_size * (problem.grad ? kBlocks : 1)),
          u_store(p.spread == Spread::kSoftTarget ? block_size * (problem.grad ? kBlocks : 1) : 0) {}

    void forward(std::int64_t outer, std::int64_t first, int n, TileSums& sums) {
        rows.begin(p, outer, first, n);
        for (int b = 0; b < n; b += kWidth) {
            A *x = x_of(b), *u = u_of(b);
            Block::load_logits(p, outer, first + b, rows, b, std::min(kWidth, n - b), x);
            if (u) load_soft_target(outer, first + b, std::min(kWidth, n - b), u);
            find_max(x, b);
            if (p.spread != Spread::kNone) sum_spread(x, u, b);
            exponentials(x, b);
        }
        rows.finish(p, outer, first, n, sums);
        for (int b = 0; b < n && p.grad; b += kWidth) write_gradient(outer, first, b, n);
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        rows.read_stats(p, outer, first, n);
        for (int b = 0; b < n; b += kWidth) {
            A *x = x_of(b), *u = u_of(b);
            Block::load_logits(p, outer, first + b, rows, b, std::min(kWidth, n - b), x);
            if (u) load_soft_target(outer, first + b, std::min(kWidth, n - b), u);
            exponentials(x, b);
            write_gradient(outer, first, b, n);
        }
    }

private:
    // The gradient needs the exponentials of the whole tile; the value alone one block at a time.
    A* x_of(int b) const { return x_store.data() + (p.grad ? b / kWidth * block_size : 0); }
    A* u_of(int b) const { return u_store.data() ? u_store.data() + (p.grad ? b / kWidth * block_size : 0) : nullptr; }

    void load_soft_target(std::int64_t outer, std::int64_t row, int n, A* u) const {
        const std::int64_t offset = p.soft_target_stride.at(outer, row);
        const std::int64_t row_stride = p.soft_target_stride.inner, class_stride = p.soft_target_class_stride;
        if (p.soft_target_is_stored)
            Block::load_classes(as<Stored>(p.soft_target) + offset, row_stride, class_stride, classes, n, u);
        else
            Block::load_classes(as<A>(p.soft_target) + offset, row_stride, class_stride, classes, n, u);
        const A keep = A(1) - A(p.params[0]), uniform = A(p.params[0]) / A(classes);
        const A* weights = as<A>(p.class_weight);
        for (std::int64_t c = 0; c < classes; ++c) {
            const V share = V(keep) * V::load(u + c * kWidth) + V(uniform);
            (V(weights ? weights[c] : A(1)) * share).store(u + c * kWidth);
        }
    }

    // u_j of SoftmaxRow
    V spread(const A* u, std::int64_t c) const {
        if (u) return V::load(u + c * kWidth);
        const bool weighted = p.spread == Spread::kClassWeights && p.class_weight;
        return V(weighted ? as<A>(p.class_weight)[c] : A(1));
    }

    void find_max(const A* x, int b) {
        V top = V::load(x);
        for (std::int64_t c = 1; c < classes; ++c) top = max(top, V::load(x + c * kWidth));
        top.store(rows.max + b);
    }

    void sum_spread(const A* x, const A* u, int b) {
        const V top = V::load(rows.max + b);
        V centred = A(0), total = A(0);
        for (std::int64_t c = 0; c < classes; ++c) {
            const V u_c = spread(u, c);
            // A class of weight zero contributes nothing, even at -inf.
            centred += math::select(u_c == V(A(0)), V(A(0)), u_c * (V::load(x + c * kWidth) - top));
            total += u_c;
        }
        centred.store(rows.centred + b);
        total.store(rows.sum_u + b);
    }

    void exponentials(A* x, int b) {
        const V top = V::load(rows.max + b);
        V sum = A(0);
        for (std::int64_t c = 0; c < classes; ++c) {
            const V e = math::exp_not_positive(V::load(x + c * kWidth) - top);
            e.store(x + c * kWidth);
            sum += e;
        }
        sum.store(rows.sum + b);
    }

    // x holds exp(z - max)
    void write_gradient(std::int64_t outer, std::int64_t first, int b, int n) const {
        A* const x = x_of(b);
        const A* const u = u_of(b);
        const V alpha = V::load(rows.alpha + b), gamma = V::load(rows.gamma + b);
        for (std::int64_t c = 0; c < classes; ++c) {
            V g = alpha * V::load(x + c * kWidth);
            if (p.spread != Spread::kNone) g += gamma * spread(u, c);
            g.store(x + c * kWidth);
        }
        const int count = std::min(kWidth, n - b);
        Block::store_gradient(p, outer, first + b, count, x);
        // The target's own term, added before rounding to the stored type: here and not in the block, where a vector
        // read right after a single number was written waits for the write.
        Stored* const grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, first + b);
        for (int i = 0; i < count && p.target; ++i) {
            const std::int64_t y = rows.target[b + i];
            grad[i * p.grad_stride.inner + y * p.grad_class_stride] =
                narrow<Stored>(x[y * kWidth + i] + rows.beta[b + i]);
        }
    }

    const RowProblem& p;
    const std::int64_t classes, block_size;
    Scratch<A> x_store, u_store;  // per block [classes][kWidth]: logits, then exponentials, then gradient; u_j
    TileRows<A> rows;
};

}  // namespace FL_ISA
}  // namespace fused_losses
