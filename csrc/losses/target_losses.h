// Losses that are functions phi(t) of t = log p_y alone. Each eval returns phi and its slope dphi/dt; the gradient of
// the logits follows as slope * ([j = y] - p_j).
//
// Everything is written through t: p^q = e^(qt) and 1 - p = -expm1(t). p^(q-1), which is infinite where p underflows,
// never appears, so nothing has to be clamped.
#pragma once

#include <limits>

#include "core/pow.h"
#include "core/softmax_loss.h"
#include "losses/cross_entropy.h"

namespace fused_losses {
inline namespace FL_ISA {

// -p t, which is 0 at p = 0.
template <class T>
FL_HD T neg_p_log_p(T p, T t) {
    return math::select(p > T(0), -p * t, p);
}

// params: scale
struct MAE {
    static constexpr const char* name = "mae";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        return {-params[0] * math::expm1(t), -params[0] * math::exp(t)};
    }
};

// params: q. (1 - p^q) / q.
struct GCE {
    static constexpr const char* name = "gce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T q = params[0];
        return {-math::divide(math::expm1(q * t), q), -math::exp(q * t)};
    }
};

// params: a, q. ((a + 1)^q - (a + p)^q) / q, written as -(a + 1)^q expm1(q r) / q, r = log((a + p) / (a + 1)), because
// the difference cancels as p -> 1.
struct AGCE {
    static constexpr const char* name = "agce";
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T a = params[0], q = params[1], p = math::exp(t), top = a + T(1), log_top = math::log(top);
        const T log_ratio = math::log_near_one(math::divide(a + p, top), math::divide(math::expm1(t), top));
        const T value = -math::exp(q * log_top) * math::divide(math::expm1(q * log_ratio), q);
        return {value, -p * math::exp((q - T(1)) * (log_top + log_ratio))};
    }
};

// params: a, q. ((a - p)^q - (a - 1)^q) / q with a > 1, written as -(a - p)^q expm1(-q r) / q, r = log((a - p) / (a -
// 1)): the larger power, which does not underflow before the difference does.
struct AUE {
    static constexpr const char* name = "aue";
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        // An a so near to 1 that their difference is rounded away counts as the next number above 1.
        const T rounded = params[0] - T(1), least = T(std::numeric_limits<math::scalar_t<T>>::epsilon());
        const T gap = math::select(rounded < least, least, rounded), q = params[1];
        const T miss = -math::expm1(t), rest = gap + miss;  // 1 - p, a - p
        const T power = math::exp((q - T(1)) * math::log(rest));
        const T log_of = math::log1p(miss / gap);
        return {-rest * power * math::divide(math::expm1(-q * log_of), q), -math::exp(t) * power};
    }
};

// params: a. exp(-p / a); its smallest value is exp(-1 / a), not 0.
struct AE {
    static constexpr const char* name = "ae";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T ratio = math::divide(math::exp(t), params[0]);
        const T value = math::exp(-ratio);
        return {value, -ratio * value};
    }
};

// params: A. A (1 - p): cross entropy with label and prediction exchanged and log 0 := -A.
struct RCE {
    static constexpr const char* name = "rce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        return MAE::eval(t, params);
    }
};

// params: alpha, beta, A. alpha CE + beta RCE.
struct SCE {
    static constexpr const char* name = "sce";
    static constexpr int num_params = 3;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T alpha = params[0], beta = params[1];
        const ValueSlope<T> rce = RCE::eval(t, params + 2);
        // alpha = 0 must stay 0 where t = -inf
        const T ce = math::select(alpha == T(0), T(0), -alpha * t);
        return {ce + beta * rce.value, -alpha + beta * rce.slope};
    }
};

// params: order. sum_{k=1..order} (1 - p)^k / k; the slope's geometric series sums to (1 - p)^order - 1.
struct TaylorCE {
    static constexpr const char* name = "taylor_ce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T miss = -math::expm1(t);
        T value = T(0);
        for (int k = static_cast<int>(math::to_scalar(params[0])); k >= 1; --k)
            value = miss * (value + math::divide(T(1), T(k)));
        const T p = math::exp(t), at_most_1 = math::select(p > T(1), T(1), p);  // by rounding it may be above
        return {value, math::expm1(params[0] * math::log1p(-at_most_1))};
    }
};

// params: tau. -log p where p > 1 / tau, below that its tangent, so that the slope in p never exceeds tau.
struct PHuberCE {
    static constexpr const char* name = "phuber_ce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T tau = params[0], log_tau = math::log(tau);
        const T tau_p = math::exp(t + log_tau);
        const auto linear = t <= -log_tau;
        return {math::select(linear, T(1) + log_tau - tau_p, -t), math::select(linear, -tau_p, T(-1))};
    }
};

// params: pi. Jensen-Shannon divergence of label and prediction with weights (pi, 1 - pi), divided by
// H = -(1 - pi) log(1 - pi). With m = pi + (1 - pi) p it collapses to a function of p_y:
//   -m log m + (1 - pi) (p t - (1 - p) log(1 - pi)),
// whose terms cancel where p is much larger than pi. There log m = t + log(m / p) leaves
//   -m log(m / p) - pi t - (1 - pi) (1 - p) log(1 - pi).
struct JS {
    static constexpr const char* name = "js";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T pi = params[0], rest = T(1) - pi, log_rest = math::log1p(-pi);
        const T p = math::exp(t), p_minus_1 = math::expm1(t), p_log_p = -neg_p_log_p(p, t);
        const T m = pi + rest * p;
        const auto small = p < pi;
        const T excess = -math::divide(pi * p_minus_1, math::select(small, T(1), p));  // m / p - 1
        const T log_of = math::log_near_one(math::select(small, m, T(1) + excess),
                                            math::select(small, rest * p_minus_1, excess));  // m or m / p
        const T h = -rest * log_rest;
        const T value = math::select(small, rest * p_log_p, -pi * t) - m * log_of + rest * p_minus_1 * log_rest;
        const T slope = p * (log_rest - log_of) + math::select(small, p_log_p, T(0));
        return {math::divide(value, h), math::divide(rest * slope, h)};
    }
};

// params: gamma. -(1 - p)^gamma log p. Its slope is -(1 - p)^gamma (1 + gamma p r) with r = -log p / (1 - p) -> 1 as p
// -> 1.
struct Focal {
    static constexpr const char* name = "focal";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T gamma = params[0], miss = -math::expm1(t);
        const T factor = math::pow(miss, gamma);
        const T p_times_r = math::select(miss > T(0), math::divide(neg_p_log_p(math::exp(t), t), miss), T(1));
        return {math::select(miss > T(0), -factor * t, T(0) * t), -factor * (T(1) + gamma * p_times_r)};
    }
};

// params: a. log((1 + a) / (p + a)).
struct BoundedCE {
    static constexpr const char* name = "bounded_ce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T a = params[0], p = math::exp(t), top = T(1) + a;
        const T log_ratio = math::log_near_one(math::divide(p + a, top), math::divide(math::expm1(t), top));
        return {-log_ratio, -math::divide(p, p + a)};
    }
};

// params: epsilon. -log p + epsilon (1 - p): the first term of cross entropy's series in 1 - p has another factor.
struct Poly {
    static constexpr const char* name = "poly";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const ValueSlope<T> mae = MAE::eval(t, params);
        return {mae.value - t, mae.slope - T(1)};
    }
};

// params: q < 1, tau. GCE where p > p0 = tau^(-1 / (1 - q)), below that its tangent: the slope in p stays below tau.
// With t0 = log p0, tau p0 = e^(q t0).
struct PHuberGCE {
    static constexpr const char* name = "phuber_gce";
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T q = params[0], log_tau = math::log(params[1]), t0 = -math::divide(log_tau, T(1) - q);
        const ValueSlope<T> gce = GCE::eval(t, params), at_p0 = GCE::eval(t0, params);
        const T tau_p = math::exp(t + log_tau);
        const auto linear = t <= t0;
        return {math::select(linear, at_p0.value - at_p0.slope - tau_p, gce.value),
                math::select(linear, -tau_p, gce.slope)};
    }
};

// params: q, k. GCE where p > k, below that its value at k, without a gradient.
struct TruncatedGCE {
    static constexpr const char* name = "truncated_gce";
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T t_k = math::log(params[1]);
        const ValueSlope<T> gce = GCE::eval(t, params), at_k = GCE::eval(t_k, params);
        const auto truncated = t <= t_k;
        return {math::select(truncated, at_k.value, gce.value), math::select(truncated, T(0), gce.slope)};
    }
};

using TargetLosses = EachOfTarget<MAE, GCE, AGCE, AUE, AE, RCE, SCE, TaylorCE, PHuberCE, JS, Focal, BoundedCE, Poly,
                                  PHuberGCE, TruncatedGCE>;
// With cross entropy, which is one of them where it has no smoothing.
using LossesOfLogP = decltype(TypeList<CrossEntropy>{} + TargetLosses{});

}  // namespace FL_ISA
}  // namespace fused_losses
