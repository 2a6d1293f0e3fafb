// The per-row side of a tile: everything of which a row has one number. Loops run over rows, so that the log of the
// normaliser and the loss itself are vectorised too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/math.h"
#include "core/numeric.h"
#include "core/row_problem.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/tiling.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
const A* as(const void* pointer) {
    return static_cast<const A*>(pointer);
}

// Of row `row` of image `outer`.
template <class Stored>
const Stored* logits_at(const RowProblem& p, std::int64_t outer, std::int64_t row) {
    return as<Stored>(p.logits) + p.logits_stride.at(outer, row);
}
template <class Stored>
Stored* grad_at(const RowProblem& p, std::int64_t outer, std::int64_t row) {
    return static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, row);
}

// The label that lies so many elements from the first; may be ignore_index.
inline std::int64_t class_index(const RowProblem& p, std::int64_t at) {
    return visit_index_type(p.index_type, [&]<class Index>() { return std::int64_t(as<Index>(p.target)[at]); });
}

template <class A>
struct alignas(64) TileRows {
    using V = Vec<A>;
    static constexpr int kMax = Tiling::kPixels;  // the largest tile
    static constexpr int kGranule = 16;  // rows are padded to a multiple, whole vectors on every instruction set

    // Arrays first: each starts at a whole vector.
    std::int64_t target[kMax];  // 0 where there is none
    A class_weight[kMax], sample_weight[kMax], scale[kMax];
    // Set by the pass over the logits: max, sum exp(z - max), z_y, sum u (z - max), sum u
    A max[kMax], sum[kMax], target_logit[kMax], centred[kMax], sum_u[kMax];
    A sum_residual[kMax];  // sum exp(z - max) less `sum`, which is rounded
    // By evaluate_and_add or read_stats, scale included: grad_j = alpha exp(z_j - max) + gamma u_j, target_grad for z_y
    A value[kMax], alpha[kMax], gamma[kMax], target_grad[kMax];
    // Where rows have two labels: those of the second one, and what the losses of each are multiplied by. Where one is
    // ignored the other stands in its place.
    std::int64_t other_target[kMax];
    A other_weight[kMax], other_logit[kMax], other_grad[kMax], factor[kMax], other_factor[kMax];
    A first_value[kMax], first_alpha[kMax], first_gamma[kMax], first_grad[kMax];  // of the first one alone
    A counted[kMax];                 // 1, or 0 for ignored rows and behind the last row
    bool any_ignored, any_residual;  // any_residual: sum_residual has other numbers than zeros
    int padded;                      // rows rounded up to whole vectors
    A bias;                          // added to the target's logit

    bool ignored(int i) const { return counted[i] == A(0); }

    // Reads targets and weights of rows [first, first + n) of image `outer`; clears what follows, up to whole vectors.
    FL_NOINLINE void begin(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        padded = divide_up(n, kGranule) * kGranule;
        any_residual = false;
        bias = p.logit_bias_device ? *as<A>(p.logit_bias_device) : A(p.logit_bias);
        read_targets(p, outer, first, n);
        for (int i = n; i < padded; ++i) target[i] = 0, counted[i] = A(0);
        read(as<A>(p.sample_weight), p.sample_weight_stride, outer, first, n, sample_weight);
        read(as<A>(p.upstream), p.upstream_stride, outer, first, n, scale);
        const A denominator = p.denominator ? *as<A>(p.denominator) : A(1);
        const A inverse_denominator = denominator == A(0) ? A(0) : A(1) / denominator;
        for_padded([&](int i) {
            unless_ignored(i, V::load(scale + i) * V::load(sample_weight + i) * V(inverse_denominator))
                .store(scale + i);
            V(A(1)).store(class_weight + i);
        });
        const A* const weights = p.target ? as<A>(p.class_weight) : nullptr;
        for (int i = 0; i < n && weights; ++i) class_weight[i] = ignored(i) ? A(1) : weights[target[i]];
        // Ignored rows have no pass over their logits, and a loss may read sums that its pass has no use for.
        for_padded([&](int i) {
            for (A* zero : {sum_residual, centred, sum_u, max, target_logit}) V(A(0)).store(zero + i);
            V(A(1)).store(sum + i);
        });
        if (!p.other_target) return;
        for (int i = 0; i < padded; ++i)
            other_weight[i] = weights && !ignored(i) ? weights[other_target[i]] : A(1), other_logit[i] = A(0);
    }

    // log sum exp(z - max) of a vector of rows.
    V log_sums(int i) const {
        const V total = V::load(sum + i), log_sum = math::log_normal(total);
        return any_residual ? log_sum + V::load(sum_residual + i) / total : log_sum;
    }

    // Turns the sums of a pass over the logits into loss and gradient coefficients.
    void evaluate_and_add(const RowProblem& p, std::int64_t outer, std::int64_t first, int n, LossSums& sums) {
        evaluate(p);
        const std::int64_t row = outer * p.inner + first;
        if (p.stats) write_stats(p, row, n);
        A* values = static_cast<A*>(p.row_values);
        for_padded([&](int i) { unless_ignored(i, V::load(sample_weight + i) * V::load(value + i)).store(value + i); });
        for (int i = 0; i < n && values; ++i) values[row + i] = value[i];
        sums.value += sum_of_values();
        if (p.grad) scale_coefficients();
        for (int i = 0; i < padded && p.other_target; ++i) other_grad[i] *= scale[i];
    }

    // Backward: what write_stats has saved, except of rows that have become ignored since.
    void read_stats(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        const A* const stats = as<A>(p.stats) + outer * p.inner + first;
        const std::int64_t rows = p.rows();
        for (int i = n; i < padded; ++i) alpha[i] = gamma[i] = target_grad[i] = A(0);
        for (int i = 0; i < n; ++i) {
            max[i] = stats[kSavedMax * rows + i];
            alpha[i] = stats[kSavedAlpha * rows + i];
            target_grad[i] = stats[kSavedTargetGrad * rows + i];
            gamma[i] = p.class_factors != ClassFactors::kNone ? stats[kSavedGamma * rows + i] : A(0);
            if (ignored(i)) max[i] = alpha[i] = gamma[i] = target_grad[i] = A(0);
        }
        scale_coefficients();
    }

    // ---- Multi-reduction losses: n rows from the tile's row `at` on, no more than a vector. `row` is the number
    // of the first among all rows. ----

    // Weighs the rows' losses, writes them and adds them up. Those that are positive make the denominator of
    // kActiveMean.
    void weigh_and_add(const RowProblem& p, int at, int n, std::int64_t row, V values, LossSums& sums) const {
        A lane[V::size];
        values.store(lane);
        A* const out = static_cast<A*>(p.row_values);
        for (int i = 0; i < n; ++i) {
            const bool is_ignored = ignored(at + i);
            const A weighted = is_ignored ? A(0) : sample_weight[at + i] * class_weight[at + i] * lane[i];
            if (out) out[row + i] = weighted;
            sums.value += weighted;
            const bool active = !is_ignored && !(lane[i] <= A(0));  // NaN counts
            if (active) sums.weight += double(class_weight[at + i]) * double(sample_weight[at + i]);
        }
    }

    void save(const RowProblem& p, int at, int n, std::int64_t row, const V* state, int states) const {
        A* const stats = static_cast<A*>(p.stats) + row;
        for (int k = 0; k < states; ++k) store_n(stats + k * p.rows(), unless_ignored(at, state[k]), n);
    }

    static void restore(const RowProblem& p, int n, std::int64_t row, V* state, int states) {
        const A* const stats = as<A>(p.stats) + row;
        for (int k = 0; k < states; ++k) state[k] = load_n_or(stats + k * p.rows(), n, A(0));
    }

    // The margin of each row's target.
    V margins(const RowProblem& p, int at) const {
        if (!p.first_param) return A(p.params[0]);
        A margins[V::size];
        for (int i = 0; i < V::size; ++i) margins[i] = as<A>(p.first_param)[target[at + i] * p.first_param_stride];
        return V::load(margins);
    }

private:
    // Calls body with the first row of each vector.
    template <class Body>
    FL_ALWAYS_INLINE void for_padded(Body body) const {
        for (int i = 0; i < padded; i += V::size) body(i);
    }

    V unless_ignored(int i, V x) const { return math::select(V::load(counted + i) == V(A(0)), V(A(0)), x); }

    // One number per row, up to whole vectors: 1 where the pointer is null and behind the last row.
    void read(const A* source, RowStride stride, std::int64_t outer, std::int64_t first, int n, A* out) const {
        for (int i = 0; i < padded; ++i) out[i] = A(1);
        for (int i = 0; i < n && source; ++i) out[i] = source[stride.at(outer, first + i)];
    }

    // In double, each of kGranule columns on its own: a vector at a time, in an order that no instruction set changes.
    double sum_of_values() const {
        double column[kGranule] = {};
        for (int i = 0; i < padded; i += kGranule)
            for (int k = 0; k < kGranule; ++k) column[k] += double(value[i + k]);
        double sum = 0;
        for (const double c : column) sum += c;
        return sum;
    }

    void read_targets(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        any_ignored = false;
        if (!p.target) {
            for (int i = 0; i < n; ++i) target[i] = 0, counted[i] = A(1);
            return;
        }
        const Labels first_ones{p.target, p.target_stride.at(outer, first), p.target_stride.inner, target, counted};
        any_ignored = copy_labels(p, first_ones, n);
        if (p.other_target) read_others(p, outer, first, n);
    }

    // What there is after the labels themselves: each row's second one, factors, and which rows have any label. One
    // without a share counts as ignored.
    void read_others(const RowProblem& p, std::int64_t outer, std::int64_t first, int n) {
        A* const other_counted = other_factor;
        const RowStride& stride = p.other_target_stride;
        copy_labels(p, {p.other_target, stride.at(outer, first), stride.inner, other_target, other_counted}, n);
        any_ignored = false;
        for (int i = 0; i < padded; ++i) {
            const A lam = p.lam && i < n ? as<A>(p.lam)[p.lam_stride.at(outer, first + i)] : A(p.lam_of_all);
            const A mine = i < n && lam != A(0) ? counted[i] : A(0);
            const A theirs = i < n && lam != A(1) ? other_counted[i] : A(0);
            if (theirs == A(0)) other_target[i] = mine == A(0) ? 0 : target[i];
            if (mine == A(0)) target[i] = other_target[i];
            factor[i] = mine == A(0) ? A(0) : lam * A(p.label_scale[0]);
            other_factor[i] = theirs == A(0) ? A(0) : (A(1) - lam) * A(p.label_scale[1]);
            counted[i] = std::max(mine, theirs);
            any_ignored |= counted[i] == A(0);
        }
    }

    struct Labels {
        const void* from;
        std::int64_t offset, stride;
        std::int64_t* classes;  // 0 for ignored rows
        A* counted;
    };

    // Returns whether any is ignored.
    static bool copy_labels(const RowProblem& p, const Labels& labels, int n) {
        return visit_index_type(p.index_type,
                                [&]<class Index>() { return copy_labels_as<Index>(p.ignore_index, labels, n); });
    }

    template <class Index>
    static bool copy_labels_as(std::int64_t ignore_index, const Labels& labels, int n) {
        const Index* const source = as<Index>(labels.from) + labels.offset;
        std::int64_t* const classes = labels.classes;
        if (labels.stride == 1)
            for (int i = 0; i < n; ++i) classes[i] = source[i];
        else
            for (int i = 0; i < n; ++i) classes[i] = source[i * labels.stride];
        std::int64_t found = 0;
        for (int i = 0; i < n; ++i) {
            const std::int64_t y = classes[i], is_ignored = y == ignore_index;
            labels.counted[i] = A(1 - is_ignored);
            found |= is_ignored;
            classes[i] = is_ignored ? 0 : y;
        }
        return found;
    }

    void evaluate(const RowProblem& p) {
        if (p.class_factors == ClassFactors::kClassLosses) return;  // the pass has done it
        evaluate_label(p);
        if (!p.other_target) return;
        // The second label has the same softmax: the loss once more, with that label's logit and weight.
        for_padded([&](int i) {
            V::load(value + i).store(first_value + i);
            if (!p.grad) return;
            V::load(alpha + i).store(first_alpha + i);
            V::load(gamma + i).store(first_gamma + i);
            V::load(target_grad + i).store(first_grad + i);
        });
        exchange_labels();
        evaluate_label(p);
        exchange_labels();
        add_labels(p);
    }

    void exchange_labels() {
        std::swap_ranges(target_logit, target_logit + padded, other_logit);
        std::swap_ranges(class_weight, class_weight + padded, other_weight);
    }

    void evaluate_label(const RowProblem& p) {
        if (p.class_factors == ClassFactors::kSoftTarget) return evaluate_as<SoftCrossEntropy>(p);
        visit_loss(SoftmaxLosses{}, p.loss, [&]<class Loss>() { evaluate_as<Loss>(p); });
    }

    template <class Loss>
    void evaluate_as(const RowProblem& p) {
        V params[kMaxParams];
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
        const bool with_gradient = p.grad || p.stats;
        for_padded([&](int i) FL_INLINE {
            const V total = V::load(sum + i), weighted = V::load(sum_u + i), log_sum = log_sums(i);
            const V below_max = V::load(target_logit + i) - V::load(max + i), log_p = below_max - log_sum;
            const V sum_neg_log_p = weighted * log_sum - V::load(centred + i);
            const V weight = V::load(class_weight + i);
            const SoftmaxRow<V> row{log_p, sum_neg_log_p, weighted, weight, A(p.num_classes), below_max};
            const AffineRow<V> affine = Loss::eval(row, params);
            affine.value.store(value + i);
            if (!with_gradient) return;
            (affine.alpha / total).store(alpha + i);
            affine.gamma.store(gamma + i);
            target_gradient(affine, log_p, p.class_factors == ClassFactors::kOnes ? V(A(1)) : weight)
                .store(target_grad + i);
        });
    }

    // Of two labels with one softmax: their coefficients add up, but for the gradients of the labels' own classes.
    void add_labels(const RowProblem& p) {
        using math::zero_at_zero;
        for_padded([&](int i) FL_INLINE {
            const V a = V::load(factor + i), b = V::load(other_factor + i);
            (zero_at_zero(a, V::load(first_value + i)) + zero_at_zero(b, V::load(value + i))).store(value + i);
            if (!p.grad) return;
            const V alpha_a = zero_at_zero(a, V::load(first_alpha + i)),
                    gamma_a = zero_at_zero(a, V::load(first_gamma + i));
            const V alpha_b = zero_at_zero(b, V::load(alpha + i)), gamma_b = zero_at_zero(b, V::load(gamma + i));
            const V grad_a = zero_at_zero(a, V::load(first_grad + i)),
                    grad_b = zero_at_zero(b, V::load(target_grad + i));
            const auto gradient_at = [&](V alpha, V gamma, const A* logits, const A* weights) FL_INLINE {
                const V u = p.class_factors == ClassFactors::kOnes ? V(A(1)) : V::load(weights + i);
                return alpha * math::exp(V::load(logits + i) - V::load(max + i)) + gamma * u;
            };
            A same[V::size];
            for (int k = 0; k < V::size; ++k) same[k] = target[i + k] == other_target[i + k];
            const auto is_same = V::load(same) == V(A(1));
            const V b_at_a = gradient_at(alpha_b, gamma_b, target_logit, class_weight);
            const V a_at_b = gradient_at(alpha_a, gamma_a, other_logit, other_weight);
            (grad_a + math::select(is_same, grad_b, b_at_a)).store(target_grad + i);
            (grad_b + math::select(is_same, grad_a, a_at_b)).store(other_grad + i);
            (alpha_a + alpha_b).store(alpha + i);
            (gamma_a + gamma_b).store(gamma + i);
        });
    }

    void write_stats(const RowProblem& p, std::int64_t row, int n) const {
        A* const stats = static_cast<A*>(p.stats) + row;
        const std::int64_t rows = p.rows();
        for (int i = 0; i < n; ++i) {
            const bool is_ignored = ignored(i);
            stats[kSavedMax * rows + i] = is_ignored ? A(0) : max[i];
            stats[kSavedAlpha * rows + i] = is_ignored ? A(0) : alpha[i];
            stats[kSavedTargetGrad * rows + i] = is_ignored || !p.target ? A(0) : target_grad[i];
            if (p.class_factors != ClassFactors::kNone) stats[kSavedGamma * rows + i] = is_ignored ? A(0) : gamma[i];
        }
    }

    void scale_coefficients() {
        for (int i = 0; i < padded; ++i) alpha[i] *= scale[i], gamma[i] *= scale[i], target_grad[i] *= scale[i];
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
