// Losses that are functions phi(t) of t = log p_y alone. Each eval returns phi and its slope dphi/dt; the gradient of
// the logits follows as slope * ([j = y] - p_j).
//
// Everything is written through t: p^q = e^(qt) and 1 - p = -expm1(t). p^(q-1), which is infinite where p underflows,
// never appears, so nothing has to be clamped.
//
// What follows from the parameters alone derive() adds to them.
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
        const math::Exponentials<T> p(t);
        return {-params[0] * p.minus_1, -params[0] * p.value};
    }
};

// (1 - p^q) / q
template <class T>
FL_HD ValueSlope<T> gce_of(T t, T q, T of_q) {
    const math::Exponentials<T> p_to_q(q * t);
    return {-p_to_q.minus_1 * of_q, -p_to_q.value};
}

// params: q, and derived 1 / q.
struct GCE {
    static constexpr const char* name = "gce";
    static constexpr int num_params = 1;

    static void derive(double* params) { params[1] = 1 / params[0]; }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        return gce_of(t, params[0], params[1]);
    }
};

// params: a, q, and derived 1 / (a + 1), (a + 1)^q, (a + 1)^q / q. ((a + 1)^q - (a + p)^q) / q, written as
// -(a + 1)^q expm1(q r) / q, r = log((a + p) / (a + 1)), because the difference cancels as p -> 1.
struct AGCE {
    static constexpr const char* name = "agce";
    static constexpr int num_params = 2;

    static void derive(double* params) {
        const double top = params[0] + 1, power = std::pow(top, params[1]);
        params[2] = 1 / top, params[3] = power, params[4] = power / params[1];
    }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T a = params[0], q = params[1], of_top = params[2];
        const math::Exponentials<T> p(t);
        const T log_ratio = math::log_near_one((a + p.value) * of_top, p.minus_1 * of_top);
        const math::Exponentials<T> ratio_to_q(q * log_ratio);
        return {-params[4] * ratio_to_q.minus_1, -params[3] * ratio_to_q.value * math::divide(p.value, a + p.value)};
    }
};

// params: a, q, and derived 1 / a, a^(q - 1). ((a - p)^q - (a - 1)^q) / q with a > 1, written as -(a - p)^q expm1(-q r)
// / q, r = log((a - p) / (a - 1)): the larger power, which does not underflow before the difference does.
struct AUE {
    static constexpr const char* name = "aue";
    static constexpr int num_params = 2;

    static void derive(double* params) { params[2] = 1 / params[0], params[3] = std::pow(params[0], params[1] - 1); }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        // An a so near to 1 that their difference is rounded away counts as the next number above 1.
        const T rounded = params[0] - T(1), least = T(std::numeric_limits<math::scalar_t<T>>::epsilon());
        const T gap = math::select(rounded < least, least, rounded), q = params[1];
        const math::Exponentials<T> p(t);
        const T rest = gap - p.minus_1;  // a - p
        const T power = params[3] * math::coarse_pow(rest * params[2], q - T(1));
        const T above = -math::divide(p.minus_1, gap), log_of = math::log_near_one(T(1) + above, above);
        return {-rest * power * math::divide(math::Exponentials<T>(-q * log_of).minus_1, q), -p.value * power};
    }
};

// params: a. exp(-p / a); its smallest value is exp(-1 / a), not 0.
struct AE {
    static constexpr const char* name = "ae";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T ratio = math::divide(math::exp_not_positive(t), params[0]);
        const T value = math::exp_not_positive(-ratio);
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

// params: alpha, beta, A, and derived beta A. alpha CE + beta RCE.
struct SCE {
    static constexpr const char* name = "sce";
    static constexpr int num_params = 3;

    static void derive(double* params) { params[3] = params[1] * params[2]; }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T alpha = params[0];
        const ValueSlope<T> rce = RCE::eval(t, params + 3);
        // alpha = 0 must stay 0 where t = -inf
        const T ce = math::select(alpha == T(0), T(0), -alpha * t);
        return {ce + rce.value, -alpha + rce.slope};
    }
};

// params: order. sum_{k=1..order} (1 - p)^k / k; its slope is -p sum_{k<order} (1 - p)^k.
struct TaylorCE {
    static constexpr const char* name = "taylor_ce";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const math::Exponentials<T> p(t);
        T value = T(0), powers = T(0);
        for (int k = static_cast<int>(math::to_scalar(params[0])); k >= 1; --k) {
            value = -p.minus_1 * (value + math::divide(T(1), T(k)));
            powers = T(1) - p.minus_1 * powers;
        }
        return {value, -p.value * powers};
    }
};

// params: tau, and derived log tau. -log p where p > 1 / tau, below that its tangent, so that the slope in p never
// exceeds tau.
struct PHuberCE {
    static constexpr const char* name = "phuber_ce";
    static constexpr int num_params = 1;

    static void derive(double* params) { params[1] = std::log(params[0]); }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T log_tau = params[1], tau_p = params[0] * math::exp_not_positive(t);
        const auto linear = t <= -log_tau;
        return {math::select(linear, T(1) + log_tau - tau_p, -t), math::select(linear, -tau_p, T(-1))};
    }
};

// params: pi, and derived 1 - pi, log(1 - pi), 1 / H, (1 - pi) / H. Jensen-Shannon divergence of label and prediction
// with weights (pi, 1 - pi), divided by H = -(1 - pi) log(1 - pi). With m = pi + (1 - pi) p it collapses to a function
// of p_y:
//   -m log m + (1 - pi) (p t - (1 - p) log(1 - pi)),
// whose terms cancel where p is much larger than pi. There log m = t + log(m / p) leaves
//   -m log(m / p) - pi t - (1 - pi) (1 - p) log(1 - pi).
struct JS {
    static constexpr const char* name = "js";
    static constexpr int num_params = 1;

    static void derive(double* params) {
        const double rest = 1 - params[0], log_rest = std::log1p(-params[0]);
        params[1] = rest, params[2] = log_rest, params[3] = -1 / (rest * log_rest), params[4] = -1 / log_rest;
    }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T pi = params[0], rest = params[1], log_rest = params[2];
        const math::Exponentials<T> p(t);
        const T p_log_p = -neg_p_log_p(p.value, t);
        const T m = pi + rest * p.value;
        const auto small = p.value < pi;
        const T excess = -math::divide(pi * p.minus_1, math::select(small, T(1), p.value));  // m / p - 1
        const T log_of = math::log_near_one(math::select(small, m, T(1) + excess),
                                            math::select(small, rest * p.minus_1, excess));  // m or m / p
        const T value = math::select(small, rest * p_log_p, -pi * t) - m * log_of;
        const T slope = p.value * (log_rest - log_of) + math::select(small, p_log_p, T(0));
        return {params[3] * value - p.minus_1, params[4] * slope};
    }
};

// params: gamma. -(1 - p)^gamma log p. Its slope is -(1 - p)^gamma (1 + gamma p r) with r = -log p / (1 - p) -> 1 as p
// -> 1.
struct Focal {
    static constexpr const char* name = "focal";
    static constexpr int num_params = 1;

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T gamma = params[0];
        const math::Exponentials<T> p(t);
        const T miss = math::not_negative(-p.minus_1);  // t may be above 0 by rounding, of the eps-softmax
        const T power = math::exp_not_positive(gamma * math::log_near_one(miss, -p.value));
        const T factor = math::select(gamma == T(0), T(1), power);
        const T p_times_r = math::select(miss > T(0), math::divide(neg_p_log_p(p.value, t), miss), T(1));
        return {math::select(miss > T(0), -factor * t, T(0) * t), -factor * (T(1) + gamma * p_times_r)};
    }
};

// params: a, and derived 1 / (1 + a). log((1 + a) / (p + a)).
struct BoundedCE {
    static constexpr const char* name = "bounded_ce";
    static constexpr int num_params = 1;

    static void derive(double* params) { params[1] = 1 / (1 + params[0]); }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const T a = params[0], of_top = params[1];
        const math::Exponentials<T> p(t);
        return {-math::log_near_one((p.value + a) * of_top, p.minus_1 * of_top), -math::divide(p.value, p.value + a)};
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

// params: q < 1, tau, and derived t0, intercept, 1 / q. GCE where p > p0 = tau^(-1 / (1 - q)), below that its tangent,
// intercept - tau p: the slope in p stays below tau. With t0 = log p0, tau p0 = e^(q t0).
struct PHuberGCE {
    static constexpr const char* name = "phuber_gce";
    static constexpr int num_params = 2;

    static void derive(double* params) {
        params[2] = -std::log(params[1]) / (1 - params[0]), params[4] = 1 / params[0];
        const ValueSlope<double> at_p0 = gce_of(params[2], params[0], params[4]);
        params[3] = at_p0.value - at_p0.slope;
    }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const ValueSlope<T> gce = gce_of(t, params[0], params[4]);
        const T tau_p = params[1] * math::exp_not_positive(t);
        const auto linear = t <= params[2];
        return {math::select(linear, params[3] - tau_p, gce.value), math::select(linear, -tau_p, gce.slope)};
    }
};

// params: q, k, and derived log k, value there, 1 / q. GCE where p > k, below that its value at k, without a gradient.
struct TruncatedGCE {
    static constexpr const char* name = "truncated_gce";
    static constexpr int num_params = 2;

    static void derive(double* params) {
        params[2] = std::log(params[1]), params[4] = 1 / params[0];
        params[3] = gce_of(params[2], params[0], params[4]).value;
    }

    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T* params) {
        const ValueSlope<T> gce = gce_of(t, params[0], params[4]);
        const auto truncated = t <= params[2];
        return {math::select(truncated, params[3], gce.value), math::select(truncated, T(0), gce.slope)};
    }
};

using TargetLosses = EachOfTarget<MAE, GCE, AGCE, AUE, AE, RCE, SCE, TaylorCE, PHuberCE, JS, Focal, BoundedCE, Poly,
                                  PHuberGCE, TruncatedGCE>;
// With cross entropy, which is one of them where it has no smoothing.
using LossesOfLogP = decltype(TypeList<CrossEntropy>{} + TargetLosses{});

}  // namespace FL_ISA
}  // namespace fused_losses
