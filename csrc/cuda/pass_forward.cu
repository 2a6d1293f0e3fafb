// Forward of losses of several passes, but for the bi-tempered one.
#include "cuda/pass_forward.cuh"

namespace fused_losses::cuda {

cudaError_t enqueue_pass_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.rows() == 0 && !out.loss) return cudaSuccess;
    cudaError_t error = cudaErrorInvalidValue;
    visit_pass_loss(p.loss, [&]<class Loss>() { error = enqueue_forward_of<Loss>(p, out, stream); });
    return error;
}

}  // namespace fused_losses::cuda
