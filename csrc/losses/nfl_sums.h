// NFL and a second loss with a sum of its own over the classes: the active negative losses (ANL) and the joint
// asymmetric losses (JAL). Their cross entropy forms are those with gamma = 0.
#pragma once

#include "core/pow.h"
#include "losses/normalized.h"
#include "losses/powers.h"

namespace fused_losses {
inline namespace FL_ISA {

// params: alpha, beta, gamma, detach, which second loss (0: NNFL, 1: AMSE), then A = -log min_prob and what A' exceeds
// it by, or a. alpha NFL + beta second.
//
// NNFL is 1 - (A' - n_y) / sum_k (A' - n_k): n_k is that of NFL with log p_k at least -A, A' what it is at min_prob. So
// it is 1 less the normalised loss of A' - n, whose gradient has the sign of NFL's: -d(A' - n) = dn. Summed is A - n:
// the many classes below min_prob add next to nothing, and what A' exceeds A by would be lost in a sum of many. AMSE's
// n and W are p^2, as its rule has it.
//
// Second: which it is, if that is known; gamma is 0 or 0.5 then, and its factor has no gradient of its own below
// min_prob.
enum class Second { kAny, kNNFL, kAMSE };
template <Second kSecond>
struct NFLSumOf {
    static constexpr const char* name = "nfl_sum";
    static constexpr int num_params = 7, min_classes = 2, num_terms = 2;
    static constexpr bool is_usual = kSecond != Second::kAny;

    template <class Body>
    static void visit_usual(const double* params, Body body) {
        if (!NFL::is_usual(params[2])) return;
        if (is_amse(params))
            body.template operator()<NFLSumOf<Second::kAMSE>>();
        else if (detaches(params))
            body.template operator()<NFLSumOf<Second::kNNFL>>();
    }

    template <class T>
    FL_HD static bool is_amse(const T* params) {
        return is_usual ? kSecond == Second::kAMSE : math::to_scalar(params[4]) > math::scalar_t<T>(0);
    }

    template <class T>
    FL_HD static bool detaches(const T* params) {
        return math::to_scalar(params[3]) > math::scalar_t<T>(0);
    }

    template <class T>
    FL_HD static NormalizedTerms<T, 2> terms(T log_p, T p, T miss, const T* params) {
        NormalizedTerm<T> nfl{-log_p, T(1)};
        if (is_usual || math::to_scalar(params[2]) != math::scalar_t<T>(0))
            nfl = NFL::normalized_term<is_usual>(log_p, p, miss, params + 2);
        if (is_amse(params)) return {{nfl, {p * p, p * p}}};
        if (!is_usual && !detaches(params)) return {{nfl, clamped(nfl, log_p, p, miss, params)}};
        return {{nfl, {params[5] + nfl.w * math::at_least(log_p, -params[5]), held_w(p, nfl.w, params)}}};
    }

    template <class T>
    FL_HD static T second_w(T p, T w, const T* params)
        requires(is_usual)
    {
        return is_amse(params) ? p * p : held_w(p, w, params);
    }

    // Where the factor (1 - p)^gamma is a constant, and so NFL's W. Below min_prob nothing else moves.
    template <class T>
    FL_HD static T held_w(T p, T w, const T* params) {
        return math::select(p < math::exp_not_positive(-params[5]), T(0), w);
    }

    // Where the factor moves, below min_prob, too.
    template <class T>
    FL_HD static NormalizedTerm<T> clamped(const NormalizedTerm<T>& nfl, T log_p, T p, T miss, const T* params) {
        const T most = params[5];
        const auto is_low = log_p < -most;
        const T safe = math::select(is_low, miss, T(1)), factor = math::pow(safe, params[2]);
        const T of_factor = params[2] * p * factor / safe * most;
        return {most - math::select(is_low, factor * most, nfl.n), math::select(is_low, of_factor, nfl.w)};
    }

    template <class T>
    FL_HD static NormalizedRow<T, 2> eval(T log_p, const NormalizedTerms<T, 2>& own, const Sums<T, 4>& sums,
                                          T num_classes, const T* params) {
        const AffineRow<T> nfl = normalized(own.of[0], sums.v[0], sums.v[1]);
        AffineRow<T> second;
        if (is_amse(params)) {
            second = AMSERule::of_squares(log_p, own.of[1].n, sums.v[2], num_classes, params[5]);
        } else {
            const NormalizedTerm<T> of_own{own.of[1].n + params[6], own.of[1].w};
            second = normalized(of_own, sums.v[2] + num_classes * params[6], sums.v[3]);
            second.value = T(1) - second.value;
        }
        // Without a weight in the sum, what is not finite must not count either.
        using math::zero_at_zero;
        const T alpha = params[0], beta = params[1];
        return {zero_at_zero(alpha, nfl.value) + zero_at_zero(beta, second.value),
                zero_at_zero(alpha, nfl.alpha) + zero_at_zero(beta, second.alpha),
                zero_at_zero(alpha, nfl.beta) + zero_at_zero(beta, second.beta),
                {zero_at_zero(alpha, nfl.gamma), zero_at_zero(beta, second.gamma)}};
    }
};

using NFLSum = NFLSumOf<Second::kAny>;

// A loss that is NFLSum with the parameters that Named::expand(own, full) makes of its own.
template <class Named>
struct AsNFLSum : Named {
    static constexpr int min_classes = 2, num_terms = 2;

    template <class T>
    struct Full {
        T params[NFLSum::num_params];

        FL_HD explicit Full(const T* own) { Named::expand(own, params); }
    };

    template <class T>
    FL_HD static NormalizedTerms<T, 2> terms(T log_p, T p, T miss, const T* params) {
        return NFLSum::terms(log_p, p, miss, Full<T>(params).params);
    }

    template <class T>
    FL_HD static NormalizedRow<T, 2> eval(T log_p, const NormalizedTerms<T, 2>& own, const Sums<T, 4>& sums,
                                          T num_classes, const T* params) {
        return NFLSum::eval(log_p, own, sums, num_classes, Full<T>(params).params);
    }
};

template <class T>
FL_HD void fill(T* full, T alpha, T beta, T gamma, T detach, T is_amse, T last) {
    full[0] = alpha, full[1] = beta, full[2] = gamma, full[3] = detach, full[4] = is_amse, full[5] = last;
    full[6] = T(0);
    if (math::to_scalar(is_amse) != math::scalar_t<T>(0)) return;
    full[5] = -math::log(last);
    full[6] = full[5] * math::expm1(gamma * math::log1p(-last));
}

// params: min_prob.
struct NNCE {
    static constexpr const char* name = "nnce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, T(0), T(1), T(0), T(1), T(0), own[0]);
    }
};

// params: alpha, beta, min_prob.
struct ANLCE {
    static constexpr const char* name = "anl_ce";
    static constexpr int num_params = 3;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, own[0], own[1], T(0), T(1), T(0), own[2]);
    }
};

// params: gamma, detach, min_prob.
struct NNFL {
    static constexpr const char* name = "nnfl";
    static constexpr int num_params = 3;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, T(0), T(1), own[0], own[1], T(0), own[2]);
    }
};

// params: alpha, beta, gamma, detach, min_prob.
struct ANLFL {
    static constexpr const char* name = "anl_fl";
    static constexpr int num_params = 5;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, own[0], own[1], own[2], own[3], T(0), own[4]);
    }
};

// params: alpha, beta, a.
struct JALCE {
    static constexpr const char* name = "jal_ce";
    static constexpr int num_params = 3;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, own[0], own[1], T(0), T(1), T(1), own[2]);
    }
};

// params: alpha, beta, gamma, detach, a.
struct JALFL {
    static constexpr const char* name = "jal_fl";
    static constexpr int num_params = 5;

    template <class T>
    FL_HD static void expand(const T* own, T* full) {
        fill(full, own[0], own[1], own[2], own[3], T(1), own[4]);
    }
};

template <class... Named>
using EachAsNFLSum = TypeList<NormalizedLoss<AsNFLSum<Named>>...>;

using NFLSumLosses = EachAsNFLSum<NNCE, ANLCE, NNFL, ANLFL, JALCE, JALFL>;

}  // namespace FL_ISA
}  // namespace fused_losses
