// Between the choice of a multi-reduction loss (multi_reduction.cu) and its kernels, which are compiled in files of
// their own, side by side.
#pragma once

#include "cuda/launch.h"

namespace fused_losses::cuda {

// Of a problem of a Loss that is run (losses/run_as.h). Defined in multi_reduction.cuh for each of these; a file of
// kernels instantiates it for some.
template <class Loss>
cudaError_t enqueue_multi_reduction_of(const RowProblem& p, const LossOutput& out, Direction direction,
                                       cudaStream_t stream);

// Whether the first parameter is the same for all classes of a row.
template <class Loss>
bool has_one_param_a_row(const RowProblem& p) {
    if (!p.first_param) return true;
    if constexpr (requires { Loss::is_competitors_margin(p.params); })
        return p.first_param_stride == 0 || !Loss::is_competitors_margin(p.params);
    return false;
}

}  // namespace fused_losses::cuda
