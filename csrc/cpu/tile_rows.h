// The per-row side of a tile: everything of which a row has one number. Loops run over rows, so that the log of the
// normaliser and the loss itself are vectorised too.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "core/numeric.h"
#include "core/row_problem.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
const A* as(const void* pointer) {
    return static_cast<const A*>(pointer);
}

template <class A>
struct alignas(64) TileRows {
    static constexpr int kMax = Tiling::kLanes;
    static constexpr int kGranule = 16;  // rows are padded to a multiple, whole vectors on every instruction set

    // Arrays first: each starts at a whole vector.
    std::int64_t target[kMax];  // 0 where there is none
    A class_weight[kMax], sample_weight[kMax], scale[kMax];
    // Set by the pass over the logits: max, sum exp(z - max), z_y, sum u (z - max), sum u
    A max[kMax], sum[kMax], target_logit[kMax], centred[kMax], sum_u[kMax];
    // Set by finish or read_stats: grad_j = alpha exp(z_j - max) + beta [j = y] + gamma u_j, scale included
    A value[kMax], alpha[kMax], beta[kMax], gamma[kMax];
    bool ignored[kMax];
    bool any_ignored;
    int padded;  // rows rounded up to whole vectors
    A bias;      // added to the target's logit

    // Reads targets and weights of rows [first, first + n) of image `outer`; clears what follows, up to whole vectors.
    void begin(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        padded = (n + kGranule - 1) / kGranule * kGranule;
        bias = p.logit_bias_device ? *as<A>(p.logit_bias_device) : A(p.logit_bias);
        read_targets(p, outer, first, n);
        const A denominator = p.denominator ? *as<A>(p.denominator) : A(1);
        const A share = denominator == A(0) ? A(0) : A(1) / denominator;
        for (int i = 0; i < n; ++i) {
            const A* weights = as<A>(p.class_weight);
            const A* samples = as<A>(p.sample_weight);
            const A* upstream = as<A>(p.upstream);
            class_weight[i] = weights && p.target && !ignored[i] ? weights[target[i]] : A(1);
            sample_weight[i] = samples ? samples[p.sample_weight_stride.at(outer, first + i)] : A(1);
            const A from_above = upstream ? upstream[p.upstream_stride.at(outer, first + i)] : A(1);
            scale[i] = ignored[i] ? A(0) : from_above * sample_weight[i] * share;
            centred[i] = sum_u[i] = A(0);  // losses read them even where no pass fills them
        }
        for (int i = n; i < padded; ++i) clear(i);
    }

    // Turns the sums of a pass over the logits into loss and gradient coefficients.
    void finish(const RowProblem& p, std::int64_t outer, std::int64_t first, int n, TileSums& sums) {
        evaluate(p);
        const std::int64_t row = outer * p.inner + first;
        if (p.stats) write_stats(p, row, n);
        A* values = static_cast<A*>(p.row_values);
        for (int i = 0; i < n; ++i) {
            const A weighted = ignored[i] ? A(0) : sample_weight[i] * value[i];
            if (values) values[row + i] = weighted;
            sums.value += weighted;
        }
        if (p.grad) scale_coefficients();
    }

    // Backward: what write_stats has saved, except of rows that have become ignored since.
    void read_stats(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        const A* stats = as<A>(p.stats);
        const std::int64_t rows = p.rows(), row = outer * p.inner + first;
        for (int i = 0; i < n; ++i) {
            max[i] = stats[row + i];
            alpha[i] = stats[rows + row + i];
            beta[i] = stats[2 * rows + row + i];
            gamma[i] = p.spread != Spread::kNone ? stats[3 * rows + row + i] : A(0);
            if (ignored[i]) max[i] = alpha[i] = beta[i] = gamma[i] = A(0);
        }
        scale_coefficients();
    }

    void clear(int i) {
        target[i] = 0;
        ignored[i] = true;
        class_weight[i] = sum[i] = A(1);
        sample_weight[i] = scale[i] = max[i] = target_logit[i] = centred[i] = sum_u[i] = A(0);
        alpha[i] = beta[i] = gamma[i] = A(0);
    }

private:
    void read_targets(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        any_ignored = false;
        if (!p.target) {
            for (int i = 0; i < n; ++i) target[i] = 0, ignored[i] = false;
            return;
        }
        switch (p.index_type) {
            case IndexType::kInt64: return copy_targets<std::int64_t>(p, outer, first, n);
            case IndexType::kInt32: return copy_targets<std::int32_t>(p, outer, first, n);
            case IndexType::kInt16: return copy_targets<std::int16_t>(p, outer, first, n);
            case IndexType::kUInt8: return copy_targets<std::uint8_t>(p, outer, first, n);
        }
    }

    template <class Index>
    void copy_targets(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        for (int i = 0; i < n; ++i) {
            const std::int64_t y = as<Index>(p.target)[p.target_stride.at(outer, first + i)];
            ignored[i] = y == p.ignore_index;
            any_ignored |= ignored[i];
            target[i] = ignored[i] ? 0 : y;
        }
    }

    void evaluate(const RowProblem& p) {
        if (p.spread == Spread::kSoftTarget) return evaluate_as<SoftCrossEntropy>(p);
        visit_loss(SoftmaxLosses{}, p.loss, [&]<class Loss>() { evaluate_as<Loss>(p); });
    }

    template <class Loss>
    void evaluate_as(const RowProblem& p) {
        using V = Vec<A>;
        V params[kMaxParams];
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
        for (int i = 0; i < padded; i += V::size) {
            const V total = V::load(sum + i), weighted = V::load(sum_u + i);
            const V log_sum = math::log(total);
            const V log_p = (V::load(target_logit + i) - V::load(max + i)) - log_sum;
            const V sum_neg_log_p = weighted * log_sum - V::load(centred + i);
            const SoftmaxRow<V> row{log_p, sum_neg_log_p, weighted, V::load(class_weight + i), A(p.num_classes)};
            const AffineRow<V> affine = Loss::eval(row, params);
            affine.value.store(value + i);
            (affine.alpha / total).store(alpha + i);
            affine.beta.store(beta + i);
            affine.gamma.store(gamma + i);
        }
    }

    void write_stats(const RowProblem& p, std::int64_t row, int n) const {
        A* stats = static_cast<A*>(p.stats);
        const std::int64_t rows = p.rows();
        for (int i = 0; i < n; ++i) {
            stats[row + i] = max[i];
            stats[rows + row + i] = alpha[i];
            stats[2 * rows + row + i] = beta[i];
            if (p.spread != Spread::kNone) stats[3 * rows + row + i] = gamma[i];
        }
    }

    // In memory, so that no fused multiply-add later keeps a product unrounded: with one class alpha + beta is 0.
    void scale_coefficients() {
        for (int i = 0; i < padded; ++i) alpha[i] *= scale[i], beta[i] *= scale[i], gamma[i] *= scale[i];
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
