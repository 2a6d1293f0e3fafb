// Losses divided by their sum over all possible labels, alone and added to a loss of p_y. Such a ratio is bounded and
// symmetric (over the labels it sums to 1). They need at least two classes.
#pragma once

#include "core/pass_loss.h"
#include "losses/target_losses.h"

namespace fused_losses {
inline namespace FL_ISA {

// alpha active + beta passive, for a class of weight `weight`.
template <class T>
FL_HD AffineRow<T> add(const AffineRow<T>& active, T alpha, const ValueSlope<T>& passive, T beta, T weight) {
    // Without a share in the sum, what is not finite must not count either.
    const auto times = [](T share, T x) { return math::select(share == T(0), T(0), share * x); };
    const T slope = times(beta, passive.slope);
    return {weight * (times(alpha, active.value) + times(beta, passive.value)),
            weight * (times(alpha, active.alpha) - slope), weight * (times(alpha, active.beta) + slope),
            weight * times(alpha, active.gamma)};
}

// log p_y / sum_j log p_j. With S = -sum_j log p_j: n_j = -log p_j, W_j = 1.
struct NCE {
    static constexpr const char* name = "nce";
    static constexpr int num_params = 0, min_classes = 2;

    static constexpr Spread spread(const double*) { return Spread::kOnes; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T*) {
        const AffineRow<T> nce = normalized(Share<T>{-row.log_p, T(1)}, row.sum_neg_log_p, row.num_classes);
        return add(nce, T(1), ValueSlope<T>{T(0), T(0)}, T(0), row.class_weight);
    }
};

// params: alpha, beta, then those of Passive. alpha NCE + beta Passive.
template <class Passive>
struct NCEAnd {
    static constexpr int num_params = 2 + Passive::num_params, min_classes = 2;

    static constexpr Spread spread(const double*) { return Spread::kOnes; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const AffineRow<T> nce = normalized(Share<T>{-row.log_p, T(1)}, row.sum_neg_log_p, row.num_classes);
        return add(nce, params[0], Passive::eval(row.log_p, params + 2), params[1], row.class_weight);
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
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static Share<T> share(T log_p, T p, const T* params) {
        const T gamma = params[0], miss = -math::expm1_of(log_p, p), p_log_p = neg_p_log_p(p, log_p);
        const auto misses = miss > T(0);
        T factor, other;  // (1 - p)^gamma and, but for gamma, its derivative: p (1 - p)^(gamma - 1) (-log p)
        if (math::to_scalar(gamma) == math::scalar_t<T>(0.5)) {  // the default: no power, no division
            const T root = math::rsqrt(miss);
            factor = math::select(misses, miss * root, miss);
            other = math::select(misses, p_log_p * root, miss);
        } else {
            factor = math::pow(miss, gamma);
            other = factor * math::select(misses, p_log_p / miss, T(1));  // -log p / (1 - p) -> 1 as p -> 1
        }
        const T of_factor = math::select(params[1] > T(0), T(0), gamma * other);
        return {math::select(misses, -factor * log_p, T(0) * log_p), factor + of_factor};
    }

    template <class T>
    FL_HD static AffineRow<T> eval(T log_p, T sum_n, T sum_w, const T* params) {
        return normalized(share(log_p, math::exp(log_p), params), sum_n, sum_w);
    }
};

// params: alpha, beta, gamma, detach, then those of Passive. alpha NFL + beta Passive.
template <class Passive>
struct NFLAnd {
    static constexpr int num_params = 4 + Passive::num_params;

    template <class T>
    FL_HD static Share<T> share(T log_p, T p, const T* params) {
        return NFL::share(log_p, p, params + 2);
    }

    template <class T>
    FL_HD static AffineRow<T> eval(T log_p, T sum_n, T sum_w, const T* params) {
        const AffineRow<T> nfl = NFL::eval(log_p, sum_n, sum_w, params + 2);
        return add(nfl, params[0], Passive::eval(log_p, params + 4), params[1], T(1));
    }
};

struct NFLMAE : NFLAnd<MAE> {
    static constexpr const char* name = "nfl_mae";
};
struct NFLRCE : NFLAnd<RCE> {
    static constexpr const char* name = "nfl_rce";
};

// params: q. n_j = 1 - p_j^q, W_j = q p_j^q. With f_j = e^(q (z_j - max)), p_j^q is f_j e^(-q lse): one pass suffices.
// kOrdinary: q is not so small that 1 - f would lose its digits in all classes.
template <bool kOrdinary>
struct NGCEOf {
    static constexpr const char* name = "ngce";
    static constexpr int num_params = 1, min_classes = 2, num_sums = 3, num_early_sums = 0, num_kept = 2;
    static constexpr bool needs_max = true;

    template <class T>
    struct State {
        T max, value, alpha, gamma, own;  // alpha of exp(z - max), gamma of f
    };

    template <class Body>
    static void visit_variant(const double* params, Body body) {
        params[0] < 1e-3 ? body.template operator()<NGCEOf<false>>() : body.template operator()<NGCEOf<true>>();
    }

    FL_HD static int passes(const double*) { return 1; }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        return {row.max, T(0), T(0), T(0), T(0)};
    }

    template <class T>
    FL_HD static Sums<T, 3> term(int pass, const State<T>& s, T z, T margin, math::mask_t<T> is_target,
                                 const T* params) {
        return term_keeping<true>(pass, s, z, margin, is_target, params, static_cast<T*>(nullptr));
    }

    // Kept: exp(z - max), f.
    template <bool last, class T>
    FL_HD static Sums<T, 3> term_keeping(int, const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T x = z - s.max, e = math::exp_not_positive(x), f = math::exp_not_positive(params[0] * x);
        if (kept) kept[0] = e, kept[1] = f;
        // Where all f are near 1, the sum of 1 - f is not K - sum f.
        return {{e, f, kOrdinary ? T(1) - f : -math::expm1_of(params[0] * x, f)}};
    }

    template <class T>
    FL_HD static void end_pass(int, State<T>& s, const Sums<T, 3>& sums, const RowInputs<T>& row, const T* params) {
        const T q = params[0], log_sum = math::log(sums.v[0]), power = -q * log_sum;
        const T log_p = (row.target_logit - s.max) - log_sum, own = math::exp(q * log_p);
        // 1 - p^q = (1 - e^power) + e^power (1 - f)
        const T scale = math::exp(power), sum_n = scale * sums.v[2] - row.num_classes * math::expm1_of(power, scale);
        const Share<T> share{-math::expm1_of(q * log_p, own), q * own};
        const AffineRow<T> affine = normalized(share, sum_n, q * scale * sums.v[1]);
        s.value = affine.value;
        s.alpha = affine.alpha / sums.v[0];
        s.gamma = affine.gamma * q * scale;
        s.own = own_gradient(affine, log_p, share.w);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, T z, T, math::mask_t<T> is_target, const T* params) {
        const T x = z - s.max, kept[] = {math::exp_not_positive(x), math::exp_not_positive(params[0] * x)};
        return gradient_of_kept(s, kept, is_target, params);
    }

    template <class T>
    FL_HD static T gradient_of_kept(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T*) {
        return math::select(is_target, s.own, s.alpha * kept[0] + s.gamma * kept[1]);
    }
};

// Any exponent.
using NGCE = NGCEOf<false>;

using NormalizedSoftmaxLosses = TypeList<NCE, NCEMAE, NCERCE, NCEAGCE, NCEAUE>;
using NormalizedPassLosses = TypeList<OfShares<NFL>, NGCE, OfShares<NFLMAE>, OfShares<NFLRCE>>;

}  // namespace FL_ISA
}  // namespace fused_losses
