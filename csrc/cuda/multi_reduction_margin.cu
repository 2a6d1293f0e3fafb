// HEM and the multi-margin loss.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<MarginLoss<AnyMarginPolicy>>(const RowProblem&, const LossOutput&,
                                                                             Direction, cudaStream_t);

}  // namespace fused_losses::cuda
