// Forward of the bi-tempered loss, whose kernels take as long to compile as those of all other losses of several
// passes.
#include "cuda/pass_forward.cuh"

namespace fused_losses::cuda {

template cudaError_t enqueue_forward_of<BiTempered>(const RowProblem&, const LossOutput&, cudaStream_t);

}  // namespace fused_losses::cuda
