// Softmax losses on vertical tiles: few classes, and NCHW.
#pragma once

#include "cpu/class_losses.h"
#include "cpu/statistics_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class VerticalSoftmax : VerticalTile<acc_t<Stored>> {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    using Tile = VerticalTile<A>;
    using Block = VerticalBlock<Stored>;
    using Tile::block, Tile::p, Tile::rows;
    static constexpr int kWidth = V::size;
    // Exponentials to a sum. Beside the largest, which is 1, those below 6e-8 vanish, but no more than so many.
    static constexpr std::int64_t kClassesPerRun = 16;

public:
    VerticalSoftmax(const RowProblem& problem, std::int64_t tile_rows)
        : Tile(problem, tile_rows),
          classes(p.num_classes),
          u_store(p.soft_target ? classes * tile_rows : 0),
          class_number(p.grad ? classes : 0),
          class_losses(p),
          statistics(p) {
        for (std::int64_t c = 0; c < classes && p.grad; ++c) class_number.data()[c] = A(c);
    }

    void forward(std::int64_t outer, std::int64_t first, int n, LossSums& sums) {
        rows.begin(p, outer, first, n);
        Tile::template load_logits<Stored>(outer, first, n);
        const bool holds_logits = !rows.any_ignored && rows.bias == A(0);  // as given
        if (p.argmax && !holds_logits) statistics.run(outer, first, n);
        for_blocks(n, [&](int b, int count) {
            A *x = block(b), *u = u_of(b);
            if (u) load_soft_target(outer, first + b, count, u);
            if (p.class_factors == ClassFactors::kClassLosses) return sum_class_losses(x, u, b, outer, first + n);
            if (p.class_factors != ClassFactors::kNone) sum_factors(x, u, b);
            if (p.argmax && holds_logits) return take_statistics(x, b, count, outer, first, n);
            exponentials<true>(x, b, outer, first + n);
        });
        rows.evaluate_and_add(p, outer, first, n, sums);
        if (p.grad) write_gradient(outer, first, n);
    }

    // From what forward has saved, which is nothing for kClassLosses: their backward runs `forward`.
    void backward(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        Tile::template load_logits<Stored>(outer, first, n);
        rows.read_stats(p, outer, first, n);
        for_blocks(n, [&](int b, int count) {
            if (u_of(b)) load_soft_target(outer, first + b, count, u_of(b));
            exponentials<true>(block(b), b, outer, first + n);
        });
        write_gradient(outer, first, n);
    }

private:
    A* u_of(int b) const { return u_store.data() ? u_store.data() + b * classes : nullptr; }

    // Calls body(b, count) for the rows [b, b + count) of each block.
    template <class Body>
    static void for_blocks(int n, Body body) {
        for (int b = 0; b < n; b += kWidth) body(b, std::min(kWidth, n - b));
    }

    void load_soft_target(std::int64_t outer, std::int64_t row, int n, A* u) const {
        const std::int64_t offset = p.soft_target_stride.at(outer, row);
        const std::int64_t row_stride = p.soft_target_stride.inner, class_stride = p.soft_target_class_stride;
        if (p.soft_target_is_stored)
            Block::load_classes(as<Stored>(p.soft_target) + offset, row_stride, class_stride, classes, n, u);
        else
            Block::load_classes(as<A>(p.soft_target) + offset, row_stride, class_stride, classes, n, u);
        const A* weights = as<A>(p.class_weight);
        if (p.class_factors == ClassFactors::kClassLosses) {
            for (std::int64_t c = 0; c < classes && weights; ++c)
                (V::load(u + c * kWidth) * V(weights[c])).store(u + c * kWidth);
            return;
        }
        const SmoothedTarget<A> smoothed(p.params, A(classes));
        for (std::int64_t c = 0; c < classes; ++c)
            smoothed(V::load(u + c * kWidth), V(weights ? weights[c] : A(1))).store(u + c * kWidth);
    }

    // Sums with the factors u_j of SoftmaxRow.
    V factor(const A* u, std::int64_t c) const {
        if (u) return V::load(u + c * kWidth);
        const bool weighted = p.class_factors == ClassFactors::kClassWeights && p.class_weight;
        return V(weighted ? as<A>(p.class_weight)[c] : A(1));
    }

    void sum_factors(const A* x, const A* u, int b) {
        const V top = V::load(rows.max + b);
        V all_centred = A(0), all = A(0);
        for_runs(classes, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) {
            V centred = A(0), sum = A(0);
            for (std::int64_t c = begin; c < end; ++c) {
                const V u_c = factor(u, c);
                // A class of weight zero contributes nothing, even at -inf.
                centred += math::select(u_c == V(A(0)), V(A(0)), u_c * (V::load(x + c * kWidth) - top));
                sum += u_c;
            }
            all_centred += centred;
            all += sum;
        });
        all_centred.store(rows.centred + b);
        all.store(rows.sum_u + b);
    }

    void sum_class_losses(A* x, A* shares, int b, std::int64_t outer, std::int64_t next) {
        if (class_losses.sums_logs) sum_factors(x, nullptr, b);
        exponentials<false>(x, b, outer, next);
        const V log_sum = rows.log_sums(b), sum_neg_log_p = V(A(classes)) * log_sum - V::load(rows.centred + b);
        const auto sums = class_losses.sum({V::load(rows.max + b), log_sum, sum_neg_log_p}, x, shares,
                                           p.grad ? x : nullptr, classes * kWidth);
        sums.value.store(rows.value + b);
        sums.alpha.store(rows.alpha + b);
        V(A(1)).store(rows.gamma + b);
        for (std::int64_t c = 0; c < classes && p.grad && class_losses.sums_logs; ++c)
            (V::load(shares + c * kWidth) + sums.gamma).store(shares + c * kWidth);
    }

    // Row statistics in the pass that takes the exponentials.
    void take_statistics(A* x, int b, int count, std::int64_t outer, std::int64_t first, int n) {
        auto all = statistics.compared_block(x);
        all.weighted = exponentials<true, true>(x, b, outer, first + n);
        all.sum = V::load(rows.sum + b);
        statistics.write_block(outer, first + b, count, all, V::load(rows.target_logit + b));
    }

    // Sums the exponentials e of block b, which take the place of the logits if kKept. Returns sum e (z - max) if
    // kWeighted. As computing takes longer than reading, the next tile's block b is fetched meanwhile; a prefetch may
    // point anywhere.
    template <bool kKept, bool kWeighted = false>
    V exponentials(A* x, int b, std::int64_t outer, std::int64_t next) {
        const Stored* const next_logits = logits_at<Stored>(p, outer, next + b);
        const Stored* const next_grad = p.grad ? grad_at<Stored>(p, outer, next + b) : nullptr;
        const bool fetch_grad = p.grad && p.grad_class_stride == 1;
        const std::int64_t step = p.logits_class_stride == 1 ? kWidth : p.logits_class_stride;
        const V top = V::load(rows.max + b);
        V all = A(0), weighted = A(0);
        for_runs(classes, kClassesPerRun, [&](std::int64_t begin, std::int64_t end) {
            V sum = A(0);
            for (std::int64_t c = begin; c < end; ++c) {
                __builtin_prefetch(next_logits + c * step, /*for writing=*/0, /*into the second cache*/ 2);
                if (fetch_grad) __builtin_prefetch(next_grad + c * kWidth, /*for writing=*/1);
                const V below = V::load(x + c * kWidth) - top, e = exp_not_positive<Stored>(below);
                if constexpr (kWeighted) weighted += math::select(e == V(A(0)), V(A(0)), e * below);
                if constexpr (kKept) e.store(x + c * kWidth);
                sum += e;
            }
            all += sum;
        });
        all.store(rows.sum + b);
        return weighted;
    }

    // The blocks hold exp(z - max)
    void write_gradient(std::int64_t outer, std::int64_t first, int n) {
        for (int i = 0; i < rows.padded; ++i) target_class[i] = p.target ? A(rows.target[i]) : A(-1);
        if (p.other_target) return write_gradient_of_both(outer, first, n);
        p.class_factors == ClassFactors::kNone ? write_gradient_as<false, false>(outer, first, n)
                                               : write_gradient_as<true, false>(outer, first, n);
    }

    void write_gradient_of_both(std::int64_t outer, std::int64_t first, int n) {
        for (int i = 0; i < rows.padded; ++i) other_class[i] = A(rows.other_target[i]);
        p.class_factors == ClassFactors::kNone ? write_gradient_as<false, true>(outer, first, n)
                                               : write_gradient_as<true, true>(outer, first, n);
    }

    template <bool with_factors, bool two_labels>
    void write_gradient_as(std::int64_t outer, std::int64_t first, int n) const {
        const auto gradient_of = [&](int b) FL_INLINE {
            const A *const u = u_of(b), *const numbers = class_number.data();
            const V alpha = V::load(rows.alpha + b), gamma = V::load(rows.gamma + b);
            const V target_grad = V::load(rows.target_grad + b), target = V::load(target_class + b);
            const V other_grad = two_labels ? V::load(rows.other_grad + b) : V(A(0));
            const V other = two_labels ? V::load(other_class + b) : V(A(0));
            return [=, this](V e, std::int64_t c) FL_INLINE {
                V g = alpha * e;
                if constexpr (with_factors) g += gamma * factor(u, c);
                if constexpr (two_labels) g = math::select(other == V(numbers[c]), other_grad, g);
                return math::select(target == V(numbers[c]), target_grad, g);
            };
        };
        Tile::template store_gradient<Stored>(outer, first, n, gradient_of);
    }

    const std::int64_t classes;
    Scratch<A> u_store;       // u_j, in blocks as the tile
    Scratch<A> class_number;  // read into all elements of a vector at once, unlike an integer
    const ClassLosses<A> class_losses;
    StatisticsRows<Stored> statistics;
    alignas(64) A target_class[TileRows<A>::kMax];
    alignas(64) A other_class[TileRows<A>::kMax];
};

}  // namespace FL_ISA
}  // namespace fused_losses
