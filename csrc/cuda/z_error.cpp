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
    Scratch(const DeviceScope& device, const std::vector<WorkShares*>& phases, int others = 0) {
        std::int64_t partial_count = 0, ticket_count = others;
        for (const WorkShares* shares : phases) {
            partial_count += shares->partial_count();
            ticket_count += shares->ticket_count();
        }
        numbers = device.scratch(partial_count, dtypes::float64);
        if (ticket_count > 0) find_counters(device, ticket_count);
        unsigned* tickets = counters + others;
        double* partials = static_cast<double*>(numbers.mutable_data_ptr());
        for (WorkShares* shares : phases) {
            shares->partials = partials;
            shares->tickets = tickets;
            partials += shares->partial_count();
            tickets += shares->ticket_count();
        }
    }

    unsigned* counters = nullptr;  // the others first

private:
    void find_counters(const DeviceScope& device, std::int64_t count) {
        if (count <= kOwnCounters) {
            if (const std::optional<int> number = number_of_stream(device))
                return check_launch(find_own_counters(*number, counters));
        }
        memory = device.scratch(count, dtypes::int32);
        counters = static_cast<unsigned*>(memory.mutable_data_ptr());
        check_launch(cudaMemsetAsync(counters, 0, sizeof(unsigned) * count, device.stream()));
    }

    Tensor numbers, memory;
};

}  // namespace

void class_moments(const ZProblem& p, double* out) {
    const DeviceScope device(p.device);
    WorkShares shares = shares_of_moments(p);
    const Scratch scratch(device, {&shares});
    check_launch(enqueue_class_moments(p, shares, out, device.stream()));
}

void z_error_mask(const ZProblem& p) {
    if (p.rows() == 0) return;
    const DeviceScope device(p.device);
    const Scratch scratch(device, {}, kMaskCounters);
    check_launch(enqueue_z_error_mask(p, scratch.counters, device.stream()));
}

void z_error_loss(const ZProblem& p) {
    const DeviceScope device(p.device);
    WorkShares shares = shares_of_loss(p), moments = shares_of_moments(p);
    std::vector<WorkShares*> phases{&shares};
    if (p.own_moments) phases.push_back(&moments);
    const Scratch scratch(device, phases, blocks_of_loss(p, moments, shares) > 1 ? kLossBarriers : 0);
    check_launch(enqueue_z_error_loss(p, moments, shares, scratch.counters, device.stream()));
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
