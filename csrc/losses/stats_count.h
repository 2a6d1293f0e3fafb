// What a row of a loss leaves behind for its gradient. For host code alone.
#pragma once

#include "core/multi_reduction_loss.h"
#include "core/row_problem.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

inline ClassFactors class_factors_of(int loss, const double* params, bool soft_target) {
    if (soft_target) return loss == kCrossEntropy ? ClassFactors::kSoftTarget : ClassFactors::kClassLosses;
    ClassFactors class_factors = ClassFactors::kNone;
    if (!is_multi_reduction_loss(loss))
        visit_loss(SoftmaxLosses{}, loss, [&]<class Loss>() { class_factors = Loss::class_factors(params); });
    return class_factors;
}

// Numbers per row that the gradient needs; 0 where it starts from the logits.
inline int stats_count_of(int loss, ClassFactors class_factors) {
    if (class_factors == ClassFactors::kClassLosses) return 0;
    int count = class_factors == ClassFactors::kNone ? 3 : 4;
    if (is_multi_reduction_loss(loss))
        visit_multi_reduction_loss(
            loss, [&]<class Loss>() { count = kStateSize<typename Loss::template State<float>, float>; });
    return count;
}

// On CUDA, rows of up to so many classes leave nothing, since these numbers would be a good part of all bytes: backward
// recomputes them. Not for the bi-tempered loss, whose passes take longer than its numbers.
inline std::int64_t most_classes_without_stats(int loss) {
    std::int64_t most = 32;
    visit_loss(CompiledLosses{}, loss, [&]<class Loss>() { most = std::is_same_v<Loss, BiTempered> ? 0 : most; });
    return most;
}

}  // namespace FL_ISA
}  // namespace fused_losses
