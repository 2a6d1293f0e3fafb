// What a row of a loss leaves behind for its gradient. For host code alone.
#pragma once

#include "core/pass_loss.h"
#include "core/row_problem.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

inline Spread spread_of(int loss, const double* params, bool soft_target) {
    if (soft_target) return Spread::kSoftTarget;
    Spread spread = Spread::kNone;
    if (!is_pass_loss(loss)) visit_loss(SoftmaxLosses{}, loss, [&]<class Loss>() { spread = Loss::spread(params); });
    return spread;
}

// Numbers per row that the gradient needs.
inline int stats_count_of(int loss, Spread spread) {
    int count = spread == Spread::kNone ? 3 : 4;
    if (is_pass_loss(loss))
        visit_pass_loss(loss, [&]<class Loss>() { count = kStateSize<typename Loss::template State<float>, float>; });
    return count;
}

}  // namespace FL_ISA
}  // namespace fused_losses
