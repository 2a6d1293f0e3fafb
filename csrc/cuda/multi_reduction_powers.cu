// Losses of powers of all probabilities, and LDR-KL.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<PowerLoss<AnyPowerRule>>(const RowProblem&, const LossOutput&,
                                                                         Direction, cudaStream_t);
template cudaError_t enqueue_multi_reduction_of<LDRKL>(const RowProblem&, const LossOutput&, Direction, cudaStream_t);

}  // namespace fused_losses::cuda
