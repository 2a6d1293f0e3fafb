// Row losses on CUDA: scratch memory and the order of launches.
#include "ops/backend.h"
#include "cuda/current_device.h"
#include "cuda/launch.h"
#include "cuda/next_upstream.h"
#include "cuda/stream_number.h"
#include "cuda/z_error.h"
#include "losses/registry.h"

#include <optional>

namespace fused_losses::cuda {
namespace {

DtypeCode acc_of(const RowProblem& p) { return p.dtype == Dtype::kFloat64 ? dtypes::float64 : dtypes::float32; }

// Of two labels with one lam for all rows each has its mean; a lam per row makes one mean of both.
void take_means_of_labels(RowProblem& p, LossOutput out, Tensor& denominators, const DeviceScope& device) {
    if (p.reduction != Reduction::kMean) return;
    denominators = device.scratch(2, acc_of(p));
    out.denominator = denominators.mutable_data_ptr();
    check_launch(enqueue_denominators(p, out, device.stream()));
    p.label_denominators = out.denominator;
    p.reduction = Reduction::kSum;
}

void launch_gradient(const RowProblem& p, cudaStream_t stream) {
    check_launch(is_multi_reduction_loss(p.loss) ? enqueue_multi_reduction_gradient(p, stream)
                                                 : enqueue_gradient(p, stream));
}

void check_classes(const RowProblem& p) {
    check(p.num_classes <= kMaxClasses, "logits must have at most ", kMaxClasses, " classes on CUDA, got ",
          p.num_classes);
}

// The sums over all rows, with the memory they need. Scratch memory goes back to torch's allocator with this object,
// before the kernels have run: whoever gets it next uses it later in the same stream.
class Sums {
public:
    explicit Sums(const DeviceScope& device) : partials(device.scratch(kPartials, dtypes::float64)) {
        to.partials = static_cast<double*>(partials.mutable_data_ptr());
        if (const std::optional<int> number = number_of_stream(device)) {
            to.own_ticket = *number;
            return;
        }
        ticket = device.scratch(1, dtypes::int32);
        to.ticket = static_cast<unsigned*>(ticket.mutable_data_ptr());
        check_launch(cudaMemsetAsync(to.ticket, 0, sizeof(unsigned), device.stream()));
    }

    LossOutput to;

private:
    Tensor partials, ticket;
};

bool is_mean(const RowProblem& p) { return p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean; }

void forward(RowProblem& p, void* loss, void* denominator) {
    check_classes(p);
    const DeviceScope device(p.device);
    check(!is_multi_reduction_loss(p.loss) || !(p.other_target || (p.grad && p.upstream)),
          "fused_losses: on CUDA this loss has one label a row, and makes no gradient from the logits alone");
    check(p.class_factors != ClassFactors::kSoftTarget || !(p.grad && p.upstream),
          "fused_losses: on CUDA cross entropy makes no gradient from logits and class probabilities alone");
    const auto enqueue = is_multi_reduction_loss(p.loss) ? &enqueue_multi_reduction_forward : &enqueue_forward;
    // A caller that will run backward gives memory for what the gradient is written for. Only then may that be assumed:
    // backward puts it right.
    const bool is_backward = p.upstream, has_backward = p.written_upstream && !is_backward;
    if (has_backward) p.assumed_upstream = assumed_upstream(p);
    if (p.written_upstream) p.next_upstream = next_upstream(p);
    if (p.reduction == Reduction::kNone) return check_launch(enqueue(p, {}, device.stream()));
    Sums sums(device);
    Tensor scratch;
    if (p.other_target) take_means_of_labels(p, sums.to, scratch, device);
    sums.to.loss = loss;
    sums.to.denominator = denominator;
    if (!p.grad) return check_launch(enqueue(p, sums.to, device.stream()));
    if (is_mean(p) && !denominator) {
        scratch = device.scratch(1, acc_of(p));
        sums.to.denominator = denominator = scratch.mutable_data_ptr();
    }
    const bool none_is_ignored = !p.target;
    p.assumed_denominator = has_backward || none_is_ignored ? assumed_denominator(p) : 0.0;
    if (p.reduction == Reduction::kMean && p.assumed_denominator == 0 && !p.denominator) {
        check_launch(enqueue_denominators(p, sums.to, device.stream()));
        p.denominator = denominator;
        // Where there may be nothing to write the kernel does not wait, and what follows it would not either.
        sums.to.follows_weights = !p.grad_is_written;
    }
    if (p.reduction != Reduction::kActiveMean) return check_launch(enqueue(p, sums.to, device.stream()));
    // The number of active rows is known only after all of them.
    RowProblem first = p;
    first.grad = nullptr;
    check_launch(enqueue(first, sums.to, device.stream()));
    p.denominator = denominator;
    p.argmax = nullptr;  // statistics are there
    launch_gradient(p, device.stream());
}

void gradient(const RowProblem& problem) {
    check_classes(problem);
    if (problem.rows() == 0) return;
    const DeviceScope device(problem.device);
    RowProblem p = problem;
    if (p.grad_is_written) p.assumed_denominator = assumed_denominator(p), p.next_upstream = next_upstream(p);
    launch_gradient(p, device.stream());
}

std::int64_t find_words_of_bits(const RowProblem& p) {
    const DeviceScope device(p.device);
    return words_of_bits(p);
}

void statistics(const RowProblem& p) {
    check_classes(p);
    const DeviceScope device(p.device);
    check_launch(enqueue_row_statistics(p, device.stream()));
}

void elr(const RowProblem& p, const ElrMemory& m) {
    check_classes(p);
    const DeviceScope device(p.device);
    check_launch(enqueue_elr(p, m, device.stream()));
}

void rescale(const RowProblem& p, const LogitRescale& of) {
    check_classes(p);
    const DeviceScope device(p.device);
    check_launch(enqueue_rescale(p, of, device.stream()));
}

void gjs(const RowProblem& p, const GjsViews& views) {
    check_classes(p);
    const DeviceScope device(p.device);
    check_launch(enqueue_gjs(p, views, device.stream()));
}

}  // namespace
}  // namespace fused_losses::cuda

namespace fused_losses {

const Backend cuda_backend{&cuda::forward,
                           &cuda::gradient,
                           &cuda::backward_recomputes,
                           &cuda::find_words_of_bits,
                           &cuda::statistics,
                           &cuda::elr,
                           &cuda::rescale,
                           &cuda::gjs,
                           &cuda::class_moments,
                           &cuda::z_error_mask,
                           &cuda::z_error_loss,
                           &cuda::z_error_gradient,
                           &cuda::update_moments};

}  // namespace fused_losses
