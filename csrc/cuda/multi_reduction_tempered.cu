// The bi-tempered loss.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<BiTempered>(const RowProblem&, const LossOutput&, Direction,
                                                            cudaStream_t);

}  // namespace fused_losses::cuda
