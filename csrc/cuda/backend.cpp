// Row losses on CUDA: scratch memory and the order of launches.
#include "ops/backend.h"
#include "cuda/current_device.h"
#include "cuda/launch.h"
#include "losses/registry.h"

namespace fused_losses {
namespace {

using cuda::check_launch;
using cuda::DeviceScope;

void enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    check_launch(is_pass_loss(p.loss) ? cuda::enqueue_pass_gradient(p, stream) : cuda::enqueue_gradient(p, stream));
}

void check_classes(const RowProblem& p) {
    TORCH_CHECK(p.num_classes <= cuda::kMaxClasses, "logits must have at most ", cuda::kMaxClasses,
                " classes on CUDA, got ", p.num_classes);
}

// Hands out pieces of one allocation of acc numbers, `rows` at a time.
class RowScratch {
public:
    RowScratch(const DeviceScope& device, const RowProblem& p, std::int64_t arrays)
        : tensor(device.scratch(arrays * p.rows(), p.dtype == Dtype::kFloat64 ? at::kDouble : at::kFloat)),
          bytes(p.rows() * tensor.element_size()),
          next(static_cast<char*>(tensor.mutable_data_ptr())) {}

    void* take(std::int64_t arrays) {
        char* const taken = next;
        next += arrays * bytes;
        return taken;
    }

private:
    at::Tensor tensor;
    std::int64_t bytes;
    char* next;
};

// Scratch memory goes back to torch's allocator when a function here returns, before the kernels have run:
// whoever gets it next uses it later in the same stream.
void forward(RowProblem& problem, const at::Tensor& loss, const at::Tensor& wanted_denominator) {
    check_classes(problem);
    const DeviceScope device(problem.device);
    RowProblem p = problem;
    const bool reduced = p.reduction != Reduction::kNone;
    const bool mean = p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean;
    const std::int64_t stats_count = p.stats_count;
    const bool own_values = reduced && !p.row_values, own_stats = p.grad && !p.stats;
    RowScratch scratch(device, p, own_values + mean + (own_stats ? stats_count : 0));
    if (own_values) p.row_values = scratch.take(1);
    if (mean) p.row_weights = scratch.take(1);
    if (own_stats) p.stats = scratch.take(stats_count);
    check_launch(is_pass_loss(p.loss) ? cuda::enqueue_pass_forward(p, device.stream())
                                      : cuda::enqueue_forward(p, device.stream()));
    at::Tensor denominator = wanted_denominator;
    if (mean && !denominator.defined()) denominator = device.scratch(1, loss.scalar_type());
    if (reduced) {
        const at::Tensor partials = device.scratch(cuda::reduction_scratch(p.rows()), at::kDouble);
        check_launch(cuda::enqueue_reduction(p, static_cast<double*>(partials.mutable_data_ptr()),
                                             loss.mutable_data_ptr(), mean ? denominator.mutable_data_ptr() : nullptr,
                                             device.stream()));
    }
    if (!p.grad) return;
    p.denominator = mean ? denominator.const_data_ptr() : nullptr;
    enqueue_gradient(p, device.stream());
}

void gradient(const RowProblem& p) {
    check_classes(p);
    if (p.rows() == 0) return;
    const DeviceScope device(p.device);
    enqueue_gradient(p, device.stream());
}

}  // namespace

Backend cuda_backend() { return {&forward, &gradient}; }

}  // namespace fused_losses
