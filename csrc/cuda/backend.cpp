// Row losses on CUDA: scratch memory, device and stream. Uses ATen's and c10's core headers only, so that it
// compiles and links against a CPU build of torch as well; at run time the CUDA build registers the device
// guard used here.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"
#include "losses/registry.h"
#include "ops/backend.h"

namespace fused_losses {
namespace {

void check(cudaError_t error) {
    TORCH_CHECK(error == cudaSuccess, "fused_losses: CUDA error: ", cudaGetErrorString(error));
}

void enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    check(is_pass_loss(p.loss) ? cuda::enqueue_pass_gradient(p, stream) : cuda::enqueue_gradient(p, stream));
}

void check_classes(const RowProblem& p) {
    TORCH_CHECK(p.num_classes <= cuda::kMaxClasses, "logits must have at most ", cuda::kMaxClasses,
                " classes on CUDA, got ", p.num_classes);
}

// Makes a device current for torch and for this library, which carries its own copy of the CUDA runtime.
class CurrentDevice {
public:
    explicit CurrentDevice(const RowProblem& p)
        : device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(p.device)), guard(device) {
        check(cudaSetDevice(p.device));
    }

    // torch's current stream, in which its allocator reuses memory.
    cudaStream_t stream() const {
        const c10::impl::VirtualGuardImpl cuda(c10::DeviceType::CUDA);
        return static_cast<cudaStream_t>(cuda.getStream(device).native_handle());
    }

    at::Tensor scratch(std::int64_t size, at::ScalarType dtype) const {
        return at::empty({size}, at::TensorOptions().device(device).dtype(dtype));
    }

private:
    c10::Device device;
    c10::DeviceGuard guard;
};

// Hands out pieces of one allocation of acc numbers, `rows` at a time.
class RowScratch {
public:
    RowScratch(const CurrentDevice& cuda, const RowProblem& p, std::int64_t arrays)
        : tensor(cuda.scratch(arrays * p.rows(), p.dtype == Dtype::kFloat64 ? at::kDouble : at::kFloat)),
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
    const CurrentDevice cuda(problem);
    RowProblem p = problem;
    const bool reduced = p.reduction != Reduction::kNone;
    const bool mean = p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean;
    const std::int64_t stats_count = p.stats_count;
    const bool own_values = reduced && !p.row_values, own_stats = p.grad && !p.stats;
    RowScratch scratch(cuda, p, own_values + mean + (own_stats ? stats_count : 0));
    if (own_values) p.row_values = scratch.take(1);
    if (mean) p.row_weights = scratch.take(1);
    if (own_stats) p.stats = scratch.take(stats_count);
    check(is_pass_loss(p.loss) ? cuda::enqueue_pass_forward(p, cuda.stream())
                               : cuda::enqueue_forward(p, cuda.stream()));
    at::Tensor denominator = wanted_denominator;
    if (mean && !denominator.defined()) denominator = cuda.scratch(1, loss.scalar_type());
    if (reduced) {
        const at::Tensor partials = cuda.scratch(cuda::reduction_scratch(p.rows()), at::kDouble);
        check(cuda::enqueue_reduction(p, static_cast<double*>(partials.mutable_data_ptr()), loss.mutable_data_ptr(),
                                      mean ? denominator.mutable_data_ptr() : nullptr, cuda.stream()));
    }
    if (!p.grad) return;
    p.denominator = mean ? denominator.const_data_ptr() : nullptr;
    enqueue_gradient(p, cuda.stream());
}

void gradient(const RowProblem& p) {
    check_classes(p);
    if (p.rows() == 0) return;
    const CurrentDevice cuda(p);
    enqueue_gradient(p, cuda.stream());
}

}  // namespace

Backend cuda_backend() { return {&forward, &gradient}; }

}  // namespace fused_losses
