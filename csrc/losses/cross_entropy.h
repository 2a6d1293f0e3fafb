// Cross entropy with label smoothing and class weights, by torch's formulas.
#pragma once

#include "core/math.h"
#include "core/softmax_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// params: s (label smoothing). Hard labels: (1 - s) w_y (-log p_y) + (s / K) sum_j w_j (-log p_j), u = w.
struct CrossEntropy {
    static constexpr const char* name = "cross_entropy";
    static constexpr int num_params = 1;

    static constexpr ClassFactors class_factors(const double* params) {
        return float(params[0]) == 0.0f ? ClassFactors::kNone : ClassFactors::kClassWeights;
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const T own = T(1) - params[0], hard = own * row.class_weight, spread = params[0] / row.num_classes;
        // Without smoothing the sum is not computed; s = 1 must not read an infinite -log p_y.
        const T hard_value = math::select(own == T(0), T(0), -hard * row.log_p);
        const T smooth_value = math::zero_at_zero(spread, row.sum_neg_log_p);
        return {hard_value + smooth_value, hard + spread * row.sum_u, -hard, -spread};
    }
};

constexpr int kCrossEntropy = 0;  // its place in lists of losses

// Without smoothing: a function of t = log p_y.
struct PlainCrossEntropy {
    template <class T>
    FL_HD static ValueSlope<T> eval(T t, const T*) {
        return {-t, T(-1)};
    }
};

// u_j of a soft target y_j: w_j ((1 - s) y_j + s / K).
template <class T>
struct SmoothedTarget {
    T keep = T(1), uniform = T(0);

    SmoothedTarget() = default;
    template <class Param>
    FL_HD SmoothedTarget(const Param* params, T num_classes)
        : keep(T(1) - T(params[0])), uniform(T(params[0]) / num_classes) {}

    template <class V>
    FL_HD V operator()(V label, V weight) const {
        return weight * (V(keep) * label + V(uniform));
    }
};

// Soft targets: sum_j u_j (-log p_j).
struct SoftCrossEntropy {
    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T*) {
        return {row.sum_neg_log_p, row.sum_u, T(0), T(-1)};
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
