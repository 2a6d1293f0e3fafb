// From the sums over a row's classes to its value and the coefficients of its gradient; what is kept of a row, and what
// backward makes of that.
#pragma once

#include "cuda/loss_output.cuh"
#include "cuda/register_launch.cuh"
#include "cuda/softmax_state.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {

// grad_j = alpha exp(z_j - max) + gamma u_j, but target_grad for the target's class. All but max include the row's
// scale. No loss is known here.
template <class A>
struct Coefficients {
    A max, alpha, target_grad, gamma;

    FL_DEVICE void scale(A by) {
        alpha *= by;
        target_grad *= by;
        gamma *= by;
    }

    FL_DEVICE A of_exponential(A e, A u, bool is_target) const {
        return is_target ? target_grad : alpha * e + gamma * u;
    }
};

template <class A>
struct LossParams {
    A of[kMaxParams];

    explicit FL_DEVICE LossParams(const A* params) {
#pragma unroll
        for (int i = 0; i < kMaxParams; ++i) of[i] = params[i];
    }
};

// Of other losses than cross entropy. The loss is a uniform branch, once a row: kernels are compiled once per dtype,
// not once per loss. Not inlined: powers and logarithms would take the registers that hold a row. The parameters come
// by value: so the compiler knows them for arguments of the kernel, which need no instruction to be loaded. Without
// u_j: of a row of weight 1.
template <KernelKind kKind, class A>
__device__ __noinline__ auto evaluate_other(int loss, LossParams<A> params, SoftmaxRow<A> row) {
    constexpr int first = kCrossEntropy + 1;
    if constexpr (kKind == KernelKind::kNoFactors) {
        return visit_known_loss<first>(LossesWithoutFactors{}, loss, [&]<class Loss>() {
            const AffineRow<A> affine = Loss::eval(row, params.of);
            return ValueSlope<A>{affine.value, affine.beta};
        });
    } else {
        return visit_known_loss<first>(SoftmaxLosses{}, loss, [&]<class Loss>() { return Loss::eval(row, params.of); });
    }
}

template <KernelKind kKind, class A>
FL_DEVICE AffineRow<A> evaluate(const RowProblem& p, const A* params, SoftmaxRow<A> row) {
    if constexpr (kKind == KernelKind::kNoFactors) {
        const A weight = row.class_weight;
        if (p.loss == kCrossEntropy) return affine_of(PlainCrossEntropy::eval(row.log_p, params), weight);
        row.class_weight = A(1);
        return affine_of(evaluate_other<kKind>(p.loss, LossParams<A>(params), row), weight);
    } else {
        if (p.class_factors == ClassFactors::kSoftTarget) return SoftCrossEntropy::eval(row, params);
        if (p.loss == kCrossEntropy) return CrossEntropy::eval(row, params);
        if (p.first_param) params = as<A>(p.first_param);  // a parameter on the device is the only one of its loss
        return evaluate_other<kKind>(p.loss, LossParams<A>(params), row);
    }
}

// What forward knows of its row, and what comes out of it.
template <class A>
struct RowEnd {
    const RowArgs<A>& args;
    LossSums& sums;

    FL_DEVICE RowEnd(const RowArgs<A>& a, LossSums& s) : args(a), sums(s) {}

    FL_DEVICE void ignore(const Row& row, bool records) const {
        if (records && args.keeps_rows) keep_row(args.problem, row, A(0), {A(0), A(0), A(0), A(0)});
    }

    // From the sums over the classes to the coefficients of the gradient for a denominator of 1, which every thread of
    // the row gets; one `records`. target_distance, target_e: of the target's logit from state.max, and its
    // exponential, as those of the others have been taken. KernelKind::kNoFactors: what is summed with u_j is not
    // there.
    template <KernelKind kKind = KernelKind::kReadFactors>
    FL_DEVICE Coefficients<A> finish(const Row& row, const Target& target, A target_logit, A target_distance,
                                     A target_e, A log_sum, const SoftmaxState<A>& state, bool records) const {
        const RowProblem& p = args.problem;
        constexpr bool sums_u = kKind != KernelKind::kNoFactors;
        SoftmaxRow<A> softmax = softmax_of<sums_u>(target_logit, target_distance, log_sum, state);
        A sample_weight = A(1);
        if (args.is_weighted)
            softmax.class_weight = class_weight_of<A>(p, target), sample_weight = sample_weight_of<A>(p, row);
        const AffineRow<A> affine = evaluate<kKind>(p, args.params, softmax);
        Coefficients<A> coefficients{state.max, affine.alpha * math::reciprocal(state.sum), affine.beta, affine.gamma};
        if (!sums_u || target.cls >= 0) {
            coefficients.target_grad += coefficients.alpha * target_e;
            constexpr bool are_ones = kKind == KernelKind::kUnitFactors || kKind == KernelKind::kStatistics;
            const bool is_one = are_ones || p.class_factors == ClassFactors::kOnes;
            if (sums_u) coefficients.target_grad += is_one ? affine.gamma : affine.gamma * softmax.class_weight;
        }
        if (records) record(row, sample_weight * affine.value, softmax.class_weight * sample_weight, coefficients);
        coefficients.scale(sample_weight);
        return coefficients;
    }

    // Where every class has a share in its own loss: from what these add up to. In the place of target_grad is what a
    // share's beta is multiplied by.
    FL_DEVICE Coefficients<A> finish_shares(const Row& row, const AffineRow<A>& all, const SoftmaxState<A>& state,
                                            bool records) const {
        const A sample_weight = args.is_weighted ? sample_weight_of<A>(args.problem, row) : A(1);
        Coefficients<A> coefficients{state.max, all.alpha * math::reciprocal(state.sum), A(1), all.gamma};
        if (records) record(row, sample_weight * all.value, sample_weight, coefficients);
        coefficients.scale(sample_weight);
        return coefficients;
    }

    // The row with the class of that logit for its target, of weight 1.
    template <bool kSumsU>
    FL_DEVICE SoftmaxRow<A> softmax_of(A logit, A distance, A log_sum, const SoftmaxState<A>& state) const {
        SoftmaxRow<A> softmax;
        const A log_p = distance - log_sum;
        softmax.log_p = log_p > A(0) ? A(0) : log_p;  // by rounding, where p_y is 1: powers of 1 - p_y
        softmax.sum_neg_log_p = kSumsU ? state.sum_u * log_sum - state.centred : A(0);
        softmax.sum_u = kSumsU ? state.sum_u : A(0);
        softmax.class_weight = A(1);
        softmax.num_classes = kSumsU ? A(args.problem.num_classes) : A(1);
        softmax.below_max = logit - state.max;
        return softmax;
    }

private:
    FL_DEVICE void record(const Row& row, A value, A weight, const Coefficients<A>& c) const {
        sums.add({static_cast<double>(value), static_cast<double>(weight)});
        if (args.keeps_rows) keep_row(args.problem, row, value, {c.max, c.alpha, c.target_grad, c.gamma});
    }
};

// The row's coefficients, multiplied by upstream * sample_weight / denominator.
template <class A>
FL_DEVICE Coefficients<A> saved_coefficients(const RowProblem& p, const Row& row) {
    const std::int64_t rows = p.rows();
    const A* stats = as<A>(p.stats) + row.number;
    Coefficients<A> coefficients{stats[kSavedMax * rows], stats[kSavedAlpha * rows], stats[kSavedTargetGrad * rows],
                                 p.class_factors != ClassFactors::kNone ? stats[kSavedGamma * rows] : A(0)};
    coefficients.scale(scale_of<A>(p, row));
    return coefficients;
}

}  // namespace fused_losses::cuda
