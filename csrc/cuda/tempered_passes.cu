// The bi-tempered loss, whose kernels take as long to compile as those of all other losses of several passes.
#include "cuda/passes.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_passes_of<BiTempered>(const RowProblem&, const LossOutput&, Direction, cudaStream_t);

}  // namespace fused_losses::cuda
