// Losses of log p_y and the mean of log p_j over all classes. They reward a prediction for being far from uniform, and
// have no lower bound.
#pragma once

#include "core/math.h"
#include "core/softmax_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// a / b, exact where the quotient is a number: what it is subtracted from may cancel it. (A product with the inverse
// may become part of the subtraction, a fused multiply-add, that leaves the error of the inverse.)
// Valid Range: b as of math::divide(), |b| >= 1.
template <class T>
FL_HD T divide_exactly(T a, T b) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) {
        const T inverse = reciprocal_approximately(b), near = a * inverse;
        const T quotient = ::fmaf(::fmaf(-near, b, a), inverse, near);
        return quotient == quotient ? quotient : near;  // infinity less infinity
    }
#endif
    return a / b;
}

// params: beta. -log p_y + beta mean_j log p_j: cross entropy less beta times that of a label drawn at random.
struct CORES {
    static constexpr const char *name = "cores", *tensor_param = "beta";
    static constexpr int num_params = 1;

    static constexpr ClassFactors class_factors(const double* params) {
        return float(params[0]) == 0.0f ? ClassFactors::kNone : ClassFactors::kOnes;
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T* params) {
        const T beta = params[0], weight = row.class_weight;
        // Divided before all else: where the two terms cancel, as of equal logits, nothing but 0 may be left.
        const T random_label = math::zero_at_zero(beta, divide_exactly(row.sum_neg_log_p, row.num_classes));
        return {weight * (-row.log_p - random_label), weight * (T(1) - beta), -weight,
                weight * math::divide(beta, row.num_classes)};
    }
};

// mean_j z_j - z_y: with beta = 1 the normalisers of the logarithms cancel.
struct Unhinged {
    static constexpr const char* name = "unhinged";
    static constexpr int num_params = 0;

    static constexpr ClassFactors class_factors(const double*) { return ClassFactors::kOnes; }

    template <class T>
    FL_HD static AffineRow<T> eval(const SoftmaxRow<T>& row, const T*) {
        const T beta = T(1);
        return CORES::eval(row, &beta);
    }
};

using MeanLogLosses = TypeList<CORES, Unhinged>;

}  // namespace FL_ISA
}  // namespace fused_losses
