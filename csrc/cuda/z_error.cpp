// Z-Error operators on CUDA: scratch memory, device and stream. Scratch goes back to torch's allocator before the
// kernel has run: whoever gets it next uses it later in the same stream.
#include "cuda/z_error.h"

#include "cuda/current_device.h"
#include "z_error/driver.h"

namespace fused_losses {
namespace {

using cuda::check_launch;

// Room for partial results and tickets; the latter start at zero.
class Scratch {
public:
    Scratch(const cuda::DeviceScope& device, const cuda::WorkShares& shares)
        : numbers(device.scratch(shares.partials, at::kDouble)), counters(device.scratch(shares.tickets(), at::kInt)) {
        if (shares.tickets() > 0)
            check_launch(cudaMemsetAsync(tickets(), 0, sizeof(unsigned) * shares.tickets(), device.stream()));
    }

    double* partials() const { return numbers.mutable_data_ptr<double>(); }
    unsigned* tickets() const { return reinterpret_cast<unsigned*>(counters.mutable_data_ptr<int>()); }

private:
    at::Tensor numbers, counters;
};

void moments(const ZProblem& p, double* out) {
    const cuda::DeviceScope device(p.device);
    const cuda::WorkShares shares = cuda::shares_of_moments(p);
    const Scratch scratch(device, shares);
    check_launch(cuda::enqueue_class_moments(p, shares, scratch.partials(), scratch.tickets(), out, device.stream()));
}

void mask(const ZProblem& p) {
    if (p.rows() == 0) return;
    const cuda::DeviceScope device(p.device);
    check_launch(cuda::enqueue_z_error_mask(p, device.stream()));
}

void loss(const ZProblem& p) {
    const cuda::DeviceScope device(p.device);
    const cuda::WorkShares shares = cuda::shares_of_loss(p);
    const Scratch scratch(device, shares);
    check_launch(cuda::enqueue_z_error_loss(p, shares, scratch.partials(), scratch.tickets(), device.stream()));
}

void gradient(const ZProblem& p) {
    if (p.rows() == 0) return;
    const cuda::DeviceScope device(p.device);
    check_launch(cuda::enqueue_z_error_gradient(p, device.stream()));
}

}  // namespace

ZErrorDriver cuda_z_error() { return {&moments, &mask, &loss, &gradient}; }

}  // namespace fused_losses
