// The contract of a loss that is affine in the softmax probabilities.
//
// With log p_j = z_j - lse (the logit bias already added to z_y), every such loss sees of its row only the numbers in
// SoftmaxRow, and its gradient is
//
//     dL/dz_j = alpha p_j + beta [j = y] + gamma u_j,
//
// so forward and backward, on the CPU and on CUDA, need one `eval` per row and one loop over the classes that knows no
// loss. A loss is a struct with
//
//     static constexpr const char* name;                            its stem in the Python registry
//     static constexpr int num_params;                              how many entries of `params` it reads
//     static constexpr ClassFactors class_factors(const double*)    the u_j, if eval reads sum_neg_log_p
//     static void derive(double* params)                            if eval reads what follows from them: derive_params
//     template <class T> static AffineRow<T> eval(SoftmaxRow<T>, const T* params)
//     what it asks of its arguments (losses/needs.h), where that is not the default
#pragma once

#include <type_traits>

#include "core/host_device.h"
#include "core/math.h"
#include "core/pow.h"
#include "core/row_problem.h"
#include "core/type_list.h"

namespace fused_losses {
inline namespace FL_ISA {

// Adds to a loss's parameters, behind the last, what follows from them alone: found once, not in every row.
template <class Loss>
void derive_params(double* params) {
    if constexpr (requires { Loss::derive(params); }) Loss::derive(params);
}

template <class T>
struct SoftmaxRow {
    T log_p;          // log p_y
    T sum_neg_log_p;  // sum_j u_j (-log p_j)
    T sum_u;          // sum_j u_j
    T class_weight;   // weight[y], 1 without weights
    T num_classes;
    T below_max = T(0);  // z_y - max_j z_j
};

template <class T>
struct AffineRow {
    T value, alpha, beta, gamma;
};

// What forward saves of a row, the same on every device: dL/dz_j = kSavedAlpha exp(z_j - kSavedMax) + kSavedGamma u_j
// but for the label's class, where it is kSavedTargetGrad (0 without a label). The sample weight is not in them.
// Without u_j there is no kSavedGamma. An ignored row has zeros.
enum SavedNumber { kSavedMax, kSavedAlpha, kSavedTargetGrad, kSavedGamma };

// dL/dz_y. In a row that is nearly certain, alpha p_y and beta cancel: alpha (p_y - 1) is exact.
template <class T>
FL_HD T target_gradient(const AffineRow<T>& affine, T log_p, T target_u) {
    return (affine.alpha + affine.beta + affine.gamma * target_u) + affine.alpha * math::Exponentials<T>(log_p).minus_1;
}

template <class T>
struct ValueSlope {
    T value, slope;
};

// Of a function of log p_y, whose gradient is [j = y] - p_j, in a row of that class weight.
template <class T>
FL_HD AffineRow<T> affine_of(const ValueSlope<T>& phi, T class_weight) {
    const T slope = class_weight * phi.slope;
    return {class_weight * phi.value, -slope, slope, T(0)};
}

// Adapts a loss that is a function of log p_y alone.
template <class Loss>
struct OfTarget {
    static constexpr const char* name = Loss::name;
    static constexpr int num_params = Loss::num_params;

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kNone; }

    static void derive(double* params) { derive_params<Loss>(params); }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        return affine_of(Loss::eval(row.log_p, params), row.class_weight);
    }
};

template <class... Losses>
using EachOfTarget = TypeList<OfTarget<Losses>...>;

}  // namespace FL_ISA
}  // namespace fused_losses
