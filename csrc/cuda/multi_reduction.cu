// The choice of a multi-reduction loss and of what it leaves for backward.
#include "cuda/multi_reduction.h"

#include "cuda/launch.cuh"
#include "cuda/register_plan.h"
#include "losses/run_as.h"

namespace fused_losses::cuda {
namespace {

cudaError_t enqueue_multi_reduction(const RowProblem& given, const LossOutput& out, Direction direction,
                                    cudaStream_t stream) {
    RowProblem p = given;
    cudaError_t error = cudaErrorInvalidValue;
    visit_multi_reduction_as_run(
        p.loss, p.params, [&]<class Loss>() { error = enqueue_multi_reduction_of<Loss>(p, out, direction, stream); });
    return error;
}

}  // namespace

cudaError_t enqueue_multi_reduction_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    return p.rows() == 0 && !out.loss ? cudaSuccess : enqueue_multi_reduction(p, out, Direction::kForward, stream);
}

std::int64_t words_of_bits(const RowProblem& given) {
    RowProblem p = given;
    bool suffice = false;
    visit_multi_reduction_as_run(p.loss, p.params, [&]<class Loss>() {
        if constexpr (kHasBits<Loss>) suffice = Loss::bits_suffice(p.params) && has_one_param_a_row<Loss>(p);
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
