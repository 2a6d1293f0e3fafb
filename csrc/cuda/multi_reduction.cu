// Multi-reduction losses, but for the bi-tempered one and those of rescaled logits.
#include "cuda/multi_reduction.cuh"

namespace fused_losses::cuda {
namespace {

cudaError_t enqueue_multi_reduction(const RowProblem& p, const LossOutput& out, Direction direction,
                                    cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    visit_multi_reduction_loss(
        p.loss, [&]<class Loss>() { error = enqueue_multi_reduction_of<Loss>(p, out, direction, stream); });
    return error;
}

}  // namespace

cudaError_t enqueue_multi_reduction_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    return p.rows() == 0 && !out.loss ? cudaSuccess : enqueue_multi_reduction(p, out, Direction::kForward, stream);
}

std::int64_t words_of_bits(const RowProblem& given) {
    RowProblem p = given;
    bool suffice = false;
    visit_multi_reduction_loss(p.loss, [&]<class Loss>() {
        if constexpr (kHasBits<Loss>) {
            RunAs<Loss>::convert(p.params);
            using Run = typename RunAs<Loss>::type;
            suffice = Run::bits_suffice(p.params) && has_one_param_a_row<Run>(p);
        }
    });
    if (!suffice || backward_recomputes(p)) return 0;
    int multiprocessors = 0;
    if (find_multiprocessors(multiprocessors) != cudaSuccess) return 0;
    const RegisterPlan plan = plan_of_bits(p, multiprocessors);
    return plan.lanes * plan.words_of_bits();
}

cudaError_t enqueue_multi_reduction_gradient(const RowProblem& p, cudaStream_t stream) {
    return enqueue_backward(
        p, [&](const RowProblem& of, Direction to) { return enqueue_multi_reduction(of, {}, to, stream); });
}

}  // namespace fused_losses::cuda
