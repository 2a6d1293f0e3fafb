// Losses of logits whose norm is fixed or bounded.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<Rescaled>(const RowProblem&, const LossOutput&, Direction,
                                                          cudaStream_t);

}  // namespace fused_losses::cuda
