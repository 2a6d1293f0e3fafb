// Normalised focal losses and their sums with another loss.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<NormalizedLoss<NFLMAE>>(const RowProblem&, const LossOutput&, Direction,
                                                                        cudaStream_t);
template cudaError_t enqueue_multi_reduction_of<NormalizedLoss<NFLSum>>(const RowProblem&, const LossOutput&, Direction,
                                                                        cudaStream_t);

}  // namespace fused_losses::cuda
