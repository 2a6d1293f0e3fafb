// The bi-tempered loss, whose kernels take as long to compile as those of all other multi-reduction losses.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_multi_reduction_of<BiTempered>(const RowProblem&, const LossOutput&, Direction,
                                                            cudaStream_t);

}  // namespace fused_losses::cuda
