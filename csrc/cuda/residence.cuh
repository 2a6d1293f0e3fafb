// Launching of kernels that hold their rows in shared memory.
#pragma once

#include "cuda/residence.h"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

template <class... Params, class... Args>
cudaError_t launch_resident(void (*kernel)(Params...), const Room& room, const RowPlan& plan, std::int64_t wanted,
                            cudaStream_t stream, const Args&... args) {
    const ClusterLaunch launch({kBlock, static_cast<int>(plan.bytes), plan.cluster},
                               resident_blocks(room, plan, wanted), stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// Launches a kernel that reads rows by RowReader, each by so many threads.
template <class Stored, class A>
cudaError_t launch_rows(void (*kernel)(RowArgs<A>), int threads, RowArgs<A>& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    const int groups = kBlock / threads;
    RowPlan plan;
    Room room;
    if (threads >= 32 && p.logits_class_stride == 1) {
        if (const cudaError_t error = find_room(kernel, room); error != cudaSuccess) return error;
        plan = plan_rows(room, p.num_classes, sizeof(Stored), groups);
    }
    args.residence = plan.residence;
    args.residence.threads = threads;
    if (plan.bytes == 0) return launch_over_rows(kernel, p.rows(), groups, stream, args);
    return launch_resident(kernel, room, plan, (p.rows() + groups - 1) / groups * plan.cluster, stream, args);
}

// Launches a kernel that reads rows by PixelTiles.
template <class Stored, class A>
cudaError_t launch_pixels(void (*kernel)(RowArgs<A>), RowArgs<A>& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    RowPlan plan;
    Room room;
    if (has_pixels(p)) {
        if (const cudaError_t error = find_room(kernel, room); error != cudaSuccess) return error;
        plan = plan_pixels(room, p, sizeof(Stored));
    }
    if (plan.bytes == 0) return launch_over_rows(kernel, p.rows(), kBlock, stream, args);
    args.residence = plan.residence;
    const std::int64_t pixels = plan.residence.pixels;
    return launch_resident(kernel, room, plan, p.outer * ((p.inner + pixels - 1) / pixels), stream, args);
}

}  // namespace fused_losses::cuda
