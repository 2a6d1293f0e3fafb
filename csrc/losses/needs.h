// What a loss asks of its arguments, as its struct says. For host code alone.
#pragma once

#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

struct LossNeeds {
    int num_params = 0;
    int min_classes = 1;
    const char* tensor_param = nullptr;  // params[0], if a 0-dim tensor may take its place
    bool has_margin = false;             // that may be one per class, too; reductions with active_mean
    bool takes_probabilities = false;    // kernels take a target of class probabilities
};

template <class Loss>
constexpr LossNeeds needs_of() {
    LossNeeds needs;
    needs.num_params = Loss::num_params;
    if constexpr (requires { Loss::min_classes; }) needs.min_classes = Loss::min_classes;
    if constexpr (requires { Loss::tensor_param; }) needs.tensor_param = Loss::tensor_param;
    if constexpr (requires { Loss::has_margin; }) needs.has_margin = Loss::has_margin;
    return needs;
}

inline LossNeeds needs_of(int loss) {
    LossNeeds needs;
    visit_loss(CompiledLosses{}, loss, [&]<class Loss>() { needs = needs_of<Loss>(); });
    needs.takes_probabilities = loss >= 0 && !is_multi_reduction_loss(loss);
    return needs;
}

}  // namespace FL_ISA
}  // namespace fused_losses
