// Row losses on CUDA: scratch memory and the order of launches.
#include "ops/backend.h"
#include "cuda/current_device.h"
#include "cuda/launch.h"
#include "cuda/z_error.h"
#include "losses/registry.h"

#include <map>
#include <mutex>

namespace fused_losses::cuda {
namespace {

void launch_gradient(const RowProblem& p, cudaStream_t stream) {
    check_launch(is_pass_loss(p.loss) ? enqueue_pass_gradient(p, stream) : enqueue_gradient(p, stream));
}

void check_classes(const RowProblem& p) {
    check(p.num_classes <= kMaxClasses, "logits must have at most ", kMaxClasses, " classes on CUDA, got ",
          p.num_classes);
}

// The smallest of its kind: a stream's launches follow each other, and each leaves the ticket as it found it. Graphs
// may run in several streams at once, so that what is captured gets a ticket of its own.
Tensor ticket_of(const DeviceScope& device) {
    const cudaStream_t stream = device.stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const bool known = cudaStreamIsCapturing(stream, &status) == cudaSuccess;
    const auto fresh = [&] {
        Tensor ticket = device.scratch(1, dtypes::int32);
        check_launch(cudaMemsetAsync(ticket.mutable_data_ptr(), 0, sizeof(unsigned), stream));
        return ticket;
    };
    if (!known || status != cudaStreamCaptureStatusNone) return fresh();
    static std::mutex mutex;
    static auto& of_stream = *new std::map<std::pair<int, cudaStream_t>, Tensor>;  // outlives the CUDA context
    const std::lock_guard lock(mutex);
    Tensor& ticket = of_stream[{device.index(), stream}];
    if (!ticket.defined()) ticket = fresh();
    return ticket;
}

// The sums over all rows, with the memory they need. Scratch memory goes back to torch's allocator with this object,
// before the kernels have run: whoever gets it next uses it later in the same stream.
class Sums {
public:
    explicit Sums(const DeviceScope& device)
        : partials(device.scratch(kPartials, dtypes::float64)), ticket(ticket_of(device)) {
        to.partials = static_cast<double*>(partials.mutable_data_ptr());
        to.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
    }

    LossOutput to;

private:
    Tensor partials, ticket;
};

// From here on a launch that counts the weights first is lost in the time that the logits take.
constexpr std::int64_t kCountFirstBytes = std::int64_t(256) << 20;

std::int64_t logits_bytes(const RowProblem& p) {
    const int size = bytes_of(p.dtype);
    return p.rows() * p.num_classes * size;
}

bool is_mean(const RowProblem& p) { return p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean; }

// What the gradient that forward writes is divided by: the number of rows, right if none is ignored, or 0 for the sum
// of weights, counted first.
double assumed_denominator(const RowProblem& p) {
    const bool assumes =
        p.reduction == Reduction::kMean && !p.class_weight && !p.sample_weight && logits_bytes(p) < kCountFirstBytes;
    return assumes ? static_cast<double>(p.rows()) : 0.0;
}

void forward(RowProblem& p, void* loss, void* denominator) {
    check_classes(p);
    const DeviceScope device(p.device);
    const DtypeCode acc = p.dtype == Dtype::kFloat64 ? dtypes::float64 : dtypes::float32;
    const auto enqueue = is_pass_loss(p.loss) ? &enqueue_pass_forward : &enqueue_forward;
    if (p.reduction == Reduction::kNone) return check_launch(enqueue(p, {}, device.stream()));
    Sums sums(device);
    Tensor scratch, stats;
    if (is_mean(p) && !denominator) scratch = device.scratch(1, acc), denominator = scratch.mutable_data_ptr();
    sums.to.loss = loss;
    sums.to.denominator = denominator;
    if (!p.grad) return check_launch(enqueue(p, sums.to, device.stream()));
    // Nobody can put a wrong gradient right later without stats.
    p.assumed_denominator = p.stats ? assumed_denominator(p) : 0.0;
    if (p.reduction == Reduction::kMean && p.assumed_denominator == 0) {
        check_launch(enqueue_denominator(p, sums.to, device.stream()));
        p.denominator = denominator;
    }
    if (p.reduction != Reduction::kActiveMean) return check_launch(enqueue(p, sums.to, device.stream()));
    // The number of active rows is known only after all of them.
    if (!p.stats) stats = device.scratch(p.stats_count * p.rows(), acc), p.stats = stats.mutable_data_ptr();
    RowProblem first = p;
    first.grad = nullptr;
    check_launch(enqueue(first, sums.to, device.stream()));
    p.denominator = denominator;
    launch_gradient(p, device.stream());
}

void gradient(const RowProblem& problem) {
    check_classes(problem);
    if (problem.rows() == 0) return;
    const DeviceScope device(problem.device);
    RowProblem p = problem;
    if (p.grad_is_written) p.assumed_denominator = assumed_denominator(p);
    launch_gradient(p, device.stream());
}

}  // namespace
}  // namespace fused_losses::cuda

namespace fused_losses {

const Backend cuda_backend{&cuda::forward,      &cuda::gradient,     &cuda::class_moments,
                           &cuda::z_error_mask, &cuda::z_error_loss, &cuda::z_error_gradient};

}  // namespace fused_losses
