// Launching of kernels that have their rows in registers.
#pragma once

#include "cuda/register_plan.h"
#include "cuda/row_access.cuh"

#include <algorithm>

namespace fused_losses::cuda {

struct RegisterArgs : RowArgs<float> {
    RegisterPlan plan;
    bool is_saved = false;  // the coefficients of all rows are in stats: only the gradient is asked for

    using RowArgs<float>::RowArgs;
};

template <class Stored, bool kSpread>
cudaError_t enqueue_registers(RegisterArgs& args, cudaStream_t stream);
template <class Stored, bool kSpread>
cudaError_t enqueue_tiles(RegisterArgs& args, cudaStream_t stream);

constexpr cudaError_t kDoesNotFit = cudaErrorInvalidClusterSize;

// As many blocks as run at the same time, `wanted` at most: each works on many rows.
template <class... Params, class... Args>
cudaError_t launch_all_resident(void (*kernel)(Params...), const BlockShape& shape, std::int64_t wanted,
                                cudaStream_t stream, const Args&... args) {
    std::int64_t resident = 0;
    const cudaError_t error = find_resident_blocks(reinterpret_cast<const void*>(kernel), shape, resident);
    if (error != cudaSuccess) return error;
    const std::int64_t most = std::min<std::int64_t>(resident, kMaxBlocks / shape.cluster * shape.cluster);
    if (most == 0) return kDoesNotFit;  // so much shared memory, or so large a cluster
    const ClusterLaunch launch(shape, std::clamp<std::int64_t>(wanted, shape.cluster, most), stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// Forward, or backward from what it saved, if rows can be held in registers.
template <class Stored, bool kSpread>
bool enqueue_if_held(const RowProblem& p, const LossOutput& out, bool is_saved, cudaStream_t stream,
                     cudaError_t& error) {
    RegisterArgs args(p, out);
    args.is_saved = is_saved;
    int multiprocessors = 0;
    error = find_multiprocessors(multiprocessors);
    if (error != cudaSuccess) return true;
    if ((args.plan = plan_tiles(p, multiprocessors))) {
        error = enqueue_tiles<Stored, kSpread>(args, stream);
        if (error != kDoesNotFit) return true;
    }
    for (int largest = kMaxCluster; largest > 0; largest /= 2) {
        if (!(args.plan = plan_direct(p, largest))) continue;
        error = enqueue_registers<Stored, kSpread>(args, stream);
        if (error != kDoesNotFit) return true;
    }
    return false;
}

}  // namespace fused_losses::cuda
