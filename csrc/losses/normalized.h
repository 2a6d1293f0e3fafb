// Losses divided by their sum over all possible labels, alone and added to a loss of p_y. Such a ratio is bounded and
// symmetric (over the labels it sums to 1). They need at least two classes.
#pragma once

#include "core/multi_reduction_loss.h"
#include "core/pow.h"
#include "losses/target_losses.h"

namespace fused_losses {
inline namespace FL_ISA {

// alpha active + beta passive, for a class of weight `weight`.
template <class T>
FL_HD AffineRow<T> add(const AffineRow<T>& active, T alpha, const ValueSlope<T>& passive, T beta, T weight) {
    // Without a weight in the sum, what is not finite must not count either.
    using math::zero_at_zero;
    const T slope = zero_at_zero(beta, passive.slope);
    return {weight * (zero_at_zero(alpha, active.value) + zero_at_zero(beta, passive.value)),
            weight * (zero_at_zero(alpha, active.alpha) - slope), weight * (zero_at_zero(alpha, active.beta) + slope),
            weight * zero_at_zero(alpha, active.gamma)};
}

// log p_y / sum_j log p_j. With S = -sum_j log p_j: n_j = -log p_j, W_j = 1.
template <class T>
FL_HD AffineRow<T> normalized_cross_entropy(const SoftmaxRow<T>& row) {
    return normalized_by(math::reciprocal_or_zero(row.sum_neg_log_p), NormalizedTerm<T>{-row.log_p, T(1)},
                         row.num_classes);
}

struct NCE {
    static constexpr const char* name = "nce";
    static constexpr int num_params = 0, min_classes = 2;

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kOnes; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T*) {
        return add(normalized_cross_entropy(row), T(1), ValueSlope<T>{T(0), T(0)}, T(0), row.class_weight);
    }
};

// params: alpha, beta, then those of Passive. alpha NCE + beta Passive.
template <class Passive>
struct NCEAnd {
    static constexpr int num_params = 2 + Passive::num_params, min_classes = 2;

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kOnes; }

    static void derive(double* params) { derive_params<Passive>(params + 2); }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        return add(normalized_cross_entropy(row), params[0], Passive::eval(row.log_p, params + 2), params[1],
                   row.class_weight);
    }
};

struct NCEMAE : NCEAnd<MAE> {
    static constexpr const char* name = "nce_mae";
};
struct NCERCE : NCEAnd<RCE> {
    static constexpr const char* name = "nce_rce";
};
struct NCEAGCE : NCEAnd<AGCE> {
    static constexpr const char* name = "nce_agce";
};
struct NCEAUE : NCEAnd<AUE> {
    static constexpr const char* name = "nce_aue";
};

// params: gamma, detach. n_j = -(1 - p_j)^gamma log p_j. With detach the factor is a constant for the gradient.
struct NFL {
    static constexpr const char* name = "nfl";
    static constexpr int num_params = 2, min_classes = 2, num_terms = 1;

    static bool is_usual(double gamma) { return gamma == 0 || gamma == 0.5; }

    // kUsual: gamma is 0 or 0.5. Nothing is chosen by a branch then.
    template <bool kUsual, class T>
    FL_HD static NormalizedTerm<T> normalized_term(T log_p, T p, T miss, const T* params) {
        const T gamma = params[0], of_factor = math::select(params[1] > T(0), T(0), gamma);
        const T p_log_p = -math::times_exp(log_p, p);
        T factor, other;  // (1 - p)^gamma and, but for gamma, its derivative: p (1 - p)^(gamma - 1) (-log p)
        if (kUsual || math::to_scalar(gamma) == math::scalar_t<T>(0.5)) {  // the default: no power, no division
            const T root = math::rsqrt(miss);
            factor = kUsual ? math::select(gamma == T(0), T(1), miss * root) : miss * root;
            other = p_log_p * root;
        } else {
            const auto misses = miss > T(std::numeric_limits<math::scalar_t<T>>::min());
            factor = math::pow(math::select(misses, miss, T(0)), gamma);
            other =
                factor * math::select(misses, math::divide(p_log_p, miss), T(1));  // -log p / (1 - p) -> 1 as p -> 1
        }
        return {-factor * log_p, factor + of_factor * other};
    }

    template <class T>
    FL_HD static NormalizedTerms<T, 1> terms(T log_p, T p, T miss, const T* params) {
        return {{normalized_term<false>(log_p, p, miss, params)}};
    }

    template <class T>
    FL_HD static NormalizedRow<T, 1> eval(T, const NormalizedTerms<T, 1>& own, const Sums<T, 2>& sums, T, const T*) {
        const AffineRow<T> nfl = normalized(own.of[0], sums.v[0], sums.v[1]);
        return {nfl.value, nfl.alpha, nfl.beta, {nfl.gamma}};
    }
};

// params: alpha, beta, gamma, detach, then those of Passive. alpha NFL + beta Passive. kUsual: as for NFL.
template <class Passive, bool kUsual = false>
struct NFLAnd {
    static constexpr const char* name = "nfl_and";
    static constexpr int num_params = 4 + Passive::num_params, min_classes = 2, num_terms = 1;
    using Usual = NFLAnd<Passive, true>;

    template <class Body>
    static void visit_usual(const double* params, Body body) {
        if (NFL::is_usual(params[2])) body.template operator()<Usual>();
    }

    template <class T>
    FL_HD static NormalizedTerms<T, 1> terms(T log_p, T p, T miss, const T* params) {
        return {{NFL::normalized_term<kUsual>(log_p, p, miss, params + 2)}};
    }

    template <class T>
    FL_HD static NormalizedRow<T, 1> eval(T log_p, const NormalizedTerms<T, 1>& own, const Sums<T, 2>& sums, T,
                                          const T* params) {
        const AffineRow<T> nfl = normalized(own.of[0], sums.v[0], sums.v[1]);
        const AffineRow<T> of = add(nfl, params[0], Passive::eval(log_p, params + 4), params[1], T(1));
        return {of.value, of.alpha, of.beta, {of.gamma}};
    }
};

struct NFLMAE : NFLAnd<MAE> {
    static constexpr const char* name = "nfl_mae";
};
struct NFLRCE : NFLAnd<RCE> {
    static constexpr const char* name = "nfl_rce";
};

using NormalizedSoftmaxLosses = TypeList<NCE, NCEMAE, NCERCE, NCEAGCE, NCEAUE>;
using NormalizedMultiReductionLosses = TypeList<NormalizedLoss<NFL>, NormalizedLoss<NFLMAE>, NormalizedLoss<NFLRCE>>;

}  // namespace FL_ISA
}  // namespace fused_losses
