// Z-Error operators on CUDA: scratch memory, device and stream. Scratch goes back to torch's allocator before the
// kernel has run: whoever gets it next uses it later in the same stream.
#include "cuda/z_error.h"

#include <algorithm>
#include <vector>

#include "cuda/current_device.h"
#include "cuda/stream_number.h"

namespace fused_losses::cuda {
namespace {

// Memory for partial results and counters, handed out to the phases of one launch.
class Scratch {
public:
    // zeros: counters that the launch needs beside the tickets of its phases.
    Scratch(const DeviceScope& device, const std::vector<WorkShares*>& phases, bool has_barriers, int zeros = 0) {
        std::int64_t partial_count = 0, ticket_count = zeros;
        for (const WorkShares* shares : phases) {
            partial_count += shares->partial_count();
            ticket_count += shares->ticket_count();
        }
        numbers = device.scratch(partial_count, dtypes::float64);
        if (has_barriers || ticket_count > 0) find_counters(device, kLossBarriers + ticket_count);
        unsigned* tickets = counters + zeros;
        double* partials = static_cast<double*>(numbers.mutable_data_ptr());
        for (WorkShares* shares : phases) {
            shares->partials = partials;
            shares->tickets = tickets;
            partials += shares->partial_count();
            tickets += shares->ticket_count();
        }
    }

    unsigned *barriers = nullptr, *counters = nullptr;

private:
    // Barriers first, whoever asks: those of a stream are not zero after a launch, as all else is.
    void find_counters(const DeviceScope& device, std::int64_t count) {
        const std::optional<int> number = count <= kOwnCounters ? number_of_stream(device) : std::nullopt;
        if (number) {
            check_launch(find_own_counters(*number, barriers));
        } else {
            memory = device.scratch(count, dtypes::int32);
            barriers = static_cast<unsigned*>(memory.mutable_data_ptr());
            check_launch(cudaMemsetAsync(barriers, 0, sizeof(unsigned) * count, device.stream()));
        }
        counters = barriers + kLossBarriers;
    }

    Tensor numbers, memory;
};

}  // namespace

void class_moments(const ZProblem& p, double* out) {
    const DeviceScope device(p.device);
    WorkShares shares = shares_of_moments(p);
    const Scratch scratch(device, {&shares}, /*has_barriers=*/false);
    check_launch(enqueue_class_moments(p, shares, out, device.stream()));
}

void z_error_mask(const ZProblem& p) {
    if (p.rows() == 0) return;
    const DeviceScope device(p.device);
    const Scratch scratch(device, {}, /*has_barriers=*/false, kMaskCounters);
    check_launch(enqueue_z_error_mask(p, scratch.counters, device.stream()));
}

void z_error_loss(const ZProblem& p) {
    const DeviceScope device(p.device);
    WorkShares shares = shares_of_loss(p), moments = shares_of_moments(p);
    std::vector<WorkShares*> phases{&shares};
    if (p.own_moments) phases.push_back(&moments);
    const Scratch scratch(device, phases, /*has_barriers=*/blocks_of_loss(p, moments, shares) > 1);
    check_launch(enqueue_z_error_loss(p, moments, shares, scratch.barriers, device.stream()));
}

void z_error_gradient(const ZProblem& p) {
    if (p.rows() == 0) return;
    const DeviceScope device(p.device);
    check_launch(enqueue_z_error_gradient(p, device.stream()));
}

void update_moments(double* running, const double* batch, std::int64_t groups, double momentum, int index) {
    const DeviceScope device(index);
    check_launch(enqueue_update_moments(running, batch, groups, momentum, device.stream()));
}

}  // namespace fused_losses::cuda
