// Losses of the eps-softmax (2508.02387), which moves the prediction towards one-hot:
//     p'_j = (p_j + m [j is the arg-max]) / (m + 1).
// Of equal largest logits each counts as the arg-max: that needs no class number beside the maximum, and classes can be
// renamed. (At most one of them is the target, and only the target's p' is looked at.)
#pragma once

#include "losses/target_losses.h"

namespace fused_losses {
inline namespace FL_ISA {

// m, log(m + 1) and 1 / (m + 1); the first one is a parameter, from which the others are derived.
template <class T>
struct EpsSoftmax {
    T m, log_whole, of_whole;
};

// log p'_y, at least log 1e-8, and its slope in log p_y. Of an arg-max 1 - p' = (1 - p) / (m + 1).
template <class T>
FL_HD ValueSlope<T> log_eps_softmax(const SoftmaxRow<T>& row, const EpsSoftmax<T>& eps) {
    const T t = row.log_p, floor = T(-18.420680743952367);
    const math::Exponentials<T> p(t);
    const auto is_top = row.below_max >= T(0);
    const T of_top = math::log_near_one((p.value + eps.m) * eps.of_whole, p.minus_1 * eps.of_whole),
            other = t - eps.log_whole;
    const auto is_low = other < floor;
    return {math::select(is_top, of_top, math::select(is_low, floor, other)),
            math::select(is_top, math::divide(p.value, p.value + eps.m), math::select(is_low, T(0), T(1)))};
}

// alpha active + beta 2 (1 - p_y), active being a function of log p'_y.
template <class T>
FL_HD AffineRow<T> add_mae(const SoftmaxRow<T>& row, const ValueSlope<T>& active, T alpha, T beta) {
    const T scale = T(2) * beta;
    const ValueSlope<T> mae = MAE::eval(row.log_p, &scale);
    return affine_of(ValueSlope<T>{alpha * active.value + mae.value, alpha * active.slope + mae.slope},
                     row.class_weight);
}

inline void derive_eps_softmax(double m, double* derived) { derived[0] = std::log1p(m), derived[1] = 1 / (m + 1); }

// params: m, and those derived from it.
struct ECE {
    static constexpr const char* name = "ece";
    static constexpr int num_params = 1;

    static void derive(double* params) { derive_eps_softmax(params[0], params + 1); }

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kNone; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const ValueSlope<T> s = log_eps_softmax(row, EpsSoftmax<T>{params[0], params[1], params[2]});
        return affine_of(ValueSlope<T>{-s.value, -s.slope}, row.class_weight);
    }
};

// params: alpha, beta, m, and those derived from m.
struct ECEMAE {
    static constexpr const char* name = "ece_mae";
    static constexpr int num_params = 3;

    static void derive(double* params) { derive_eps_softmax(params[2], params + 3); }

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kNone; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const ValueSlope<T> s = log_eps_softmax(row, EpsSoftmax<T>{params[2], params[3], params[4]});
        return add_mae(row, ValueSlope<T>{-s.value, -s.slope}, params[0], params[1]);
    }
};

// params: alpha, beta, m, gamma, and those derived from m. The focal loss of p'_y.
struct EFLMAE {
    static constexpr const char* name = "efl_mae";
    static constexpr int num_params = 4;

    static void derive(double* params) { derive_eps_softmax(params[2], params + 4); }

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kNone; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const ValueSlope<T> s = log_eps_softmax(row, EpsSoftmax<T>{params[2], params[4], params[5]});
        const ValueSlope<T> focal = Focal::eval(s.value, params + 3);
        return add_mae(row, ValueSlope<T>{focal.value, focal.slope * s.slope}, params[0], params[1]);
    }
};

using EpsSoftmaxLosses = TypeList<ECE, ECEMAE, EFLMAE>;

}  // namespace FL_ISA
}  // namespace fused_losses
