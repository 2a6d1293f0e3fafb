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

// The loss is a uniform branch, once a row: kernels are compiled once per dtype, not once per loss. Here of other
// losses than cross entropy. Not inlined, as class probabilities need it in several places. The parameters come by
// value: so the compiler knows them for arguments of the kernel, which need no instruction to be loaded.
template <class A>
__device__ __noinline__ AffineRow<A> evaluate_other(int loss, LossParams<A> params, SoftmaxRow<A> row) {
    return visit_known_loss<kCrossEntropy + 1>(SoftmaxLosses{}, loss,
                                               [&]<class Loss>() { return Loss::eval(row, params.of); });
}

template <KernelKind kKind, class A>
FL_DEVICE AffineRow<A> evaluate(const RowProblem& p, const A* params, const SoftmaxRow<A>& row) {
    if (kKind == KernelKind::kReadFactors && p.class_factors == ClassFactors::kSoftTarget)
        return SoftCrossEntropy::eval(row, params);
    if (p.loss == kCrossEntropy) return CrossEntropy::eval(row, params);
    if (p.first_param) params = as<A>(p.first_param);  // a parameter on the device is the only one of its loss
    if constexpr (kKind == KernelKind::kReadFactors) return evaluate_other(p.loss, LossParams<A>(params), row);
    return visit_known_loss<kCrossEntropy + 1>(SoftmaxLosses{}, p.loss,
                                               [&]<class Loss>() { return Loss::eval(row, params); });
}

// Without u_j, of a row of weight 1.
template <class A>
FL_DEVICE ValueSlope<A> evaluate_without_u(const RowProblem& p, const A* params, const SoftmaxRow<A>& row) {
    if (p.loss == kCrossEntropy) return PlainCrossEntropy::eval(row.log_p, params);
    return visit_known_loss<kCrossEntropy + 1>(LossesWithoutFactors{}, p.loss, [&]<class Loss>() {
        const AffineRow<A> affine = Loss::eval(row, params);
        return ValueSlope<A>{affine.value, affine.beta};
    });
}

// The logit of a row's label, its distance from SoftmaxState::max, and its exponential, as those of the others have
// been taken.
template <class A>
struct TargetLogit {
    A logit, distance, e;
};

// What forward knows of its row, and what comes out of it.
template <class A>
struct RowEnd {
    const PlannedArgs<A>& args;
    LossSums& sums;
    const A inverse_denominator;

    FL_DEVICE RowEnd(const PlannedArgs<A>& a, LossSums& s)
        : args(a), sums(s), inverse_denominator(written_inverse_denominator<A>(a.problem)) {}

    FL_DEVICE void ignore(const Row& row, bool records) const {
        if (records && args.keeps_rows) keep_row(args.problem, row, A(0), {A(0), A(0), A(0), A(0)});
    }

    // From the sums over the classes to the coefficients of the gradient, which every thread of the row gets; one
    // `records`. KernelKind::kNoFactors: what is summed with u_j is not there.
    template <KernelKind kKind = KernelKind::kReadFactors>
    FL_DEVICE Coefficients<A> finish(const Row& row, const Target& target, const TargetLogit<A>& logit, A log_sum,
                                     const SoftmaxState<A>& state, bool records) const {
        if constexpr (kKind == KernelKind::kNoFactors)
            return finish_without_u(row, target, logit, log_sum, state, records);
        else
            return finish_with_u<kKind>(row, target, logit, log_sum, state, records);
    }

    // Where every class has a share in its own loss: from what these add up to. In the place of target_grad is what a
    // share's beta is multiplied by.
    FL_DEVICE Coefficients<A> finish_shares(const Row& row, const AffineRow<A>& all, const SoftmaxState<A>& state,
                                            bool records) const {
        const A sample_weight = args.is_weighted ? sample_weight_of<A>(args.problem, row) : A(1);
        Coefficients<A> coefficients{state.max, all.alpha * math::reciprocal(state.sum), A(1), all.gamma};
        if (records) record(row, sample_weight * all.value, sample_weight, coefficients);
        const RowProblem& p = args.problem;
        coefficients.scale(sample_weight * (p.upstream ? upstream_over_denominator<A>(p, row)
                                                       : args.upstream_of(row, inverse_denominator)));
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
        softmax.num_classes = kSumsU ? A(static_cast<int>(args.problem.num_classes)) : A(1);
        softmax.below_max = logit - state.max;
        return softmax;
    }

private:
    // Of a function of log p_y.
    FL_DEVICE Coefficients<A> finish_without_u(const Row& row, const Target& target, const TargetLogit<A>& logit,
                                               A log_sum, const SoftmaxState<A>& state, bool records) const {
        const RowProblem& p = args.problem;
        const SoftmaxRow<A> softmax = softmax_of<false>(logit.logit, logit.distance, log_sum, state);
        const ValueSlope<A> phi = evaluate_without_u(p, args.params, softmax);
        const A alpha = -phi.slope * math::reciprocal(state.sum);
        Coefficients<A> coefficients{state.max, alpha, phi.slope + alpha * logit.e, A(0)};
        if (args.is_plain) [[likely]] {
            if (records) sums.add({static_cast<double>(phi.value), 1.0});
            coefficients.scale(inverse_denominator);
            return coefficients;
        }
        A class_weight = A(1), sample_weight = A(1);
        if (args.is_weighted) class_weight = class_weight_of<A>(p, target), sample_weight = sample_weight_of<A>(p, row);
        coefficients.scale(class_weight);
        if (records) record(row, sample_weight * class_weight * phi.value, class_weight * sample_weight, coefficients);
        coefficients.scale(sample_weight * args.upstream_of(row, inverse_denominator));
        return coefficients;
    }

    template <KernelKind kKind>
    FL_DEVICE Coefficients<A> finish_with_u(const Row& row, const Target& target, const TargetLogit<A>& logit,
                                            A log_sum, const SoftmaxState<A>& state, bool records) const {
        constexpr bool reads_u = kKind == KernelKind::kReadFactors;  // else there is a label, and each u_j is 1
        const RowProblem& p = args.problem;
        SoftmaxRow<A> softmax = softmax_of<true>(logit.logit, logit.distance, log_sum, state);
        A sample_weight = A(1);
        const bool is_plain = !reads_u && args.is_plain;
        if (!is_plain && args.is_weighted)
            softmax.class_weight = class_weight_of<A>(p, target), sample_weight = sample_weight_of<A>(p, row);
        const AffineRow<A> affine = evaluate<kKind>(p, args.params, softmax);
        Coefficients<A> coefficients{state.max, affine.alpha * math::reciprocal(state.sum), affine.beta, affine.gamma};
        if (!reads_u || target.cls >= 0) {
            const bool is_one = !reads_u || p.class_factors == ClassFactors::kOnes;
            coefficients.target_grad += coefficients.alpha * logit.e;
            coefficients.target_grad += is_one ? affine.gamma : affine.gamma * softmax.class_weight;
        }
        if (is_plain) {
            if (records) sums.add({static_cast<double>(affine.value), 1.0});
            coefficients.scale(inverse_denominator);
            return coefficients;
        }
        if (records) record(row, sample_weight * affine.value, softmax.class_weight * sample_weight, coefficients);
        coefficients.scale(sample_weight * args.upstream_of(row, inverse_denominator));
        return coefficients;
    }

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
