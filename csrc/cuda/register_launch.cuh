// Launching of kernels that have their rows in registers.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/register_plan.h"
#include "cuda/row_access.cuh"

#include <algorithm>
#include <iterator>
#include <utility>

namespace fused_losses::cuda {

template <class A>
struct PlannedArgs : RowArgs<A> {
    RegisterPlan plan;
    // Backward: only the gradient is asked for. What forward knows of all rows is in stats, or is recomputed.
    bool is_saved = false, recomputes = false;
    bool is_plain = false;  // forward of rows without weights, of which nothing is kept
    bool sums_u = true;     // whether the loss of a class that has a share reads the sums with u_j, 1 there

    using RowArgs<A>::RowArgs;

    void take_direction(Direction direction) {
        is_saved = direction == Direction::kBackward;
        recomputes = direction == Direction::kBackwardRecompute;
        is_plain = direction == Direction::kForward && !this->is_weighted && !this->keeps_rows;
    }
    // What a row's gradient is multiplied by, beside its weight. In forward, of all rows alike.
    FL_DEVICE A upstream_of(const Row& row, A inverse_denominator) const {
        return recomputes ? upstream_over_denominator<A>(this->problem, row) : inverse_denominator;
    }
};
using RegisterArgs = PlannedArgs<float>;

template <class Stored>
cudaError_t enqueue_direct(RegisterArgs& args, cudaStream_t stream);
template <class Stored>
cudaError_t enqueue_tiles(RegisterArgs& args, cudaStream_t stream);
template <class Stored>
cudaError_t enqueue_columns(RegisterArgs& args, cudaStream_t stream);

// Calls launch.operator()<kernel>() for the kernel of a plan, one of kTable. It is compiled for those that `launch`
// takes.
template <const auto& kTable, class Launch>
cudaError_t launch_planned(const RegisterPlan& plan, Launch launch) {
    cudaError_t error = cudaErrorInvalidValue;
    const auto try_kernel = [&]<int i>() {
        if constexpr (requires { launch.template operator()<kTable[i]>(); })
            if (plan.kernel == i) error = launch.template operator()<kTable[i]>();
    };
    [&]<int... i>(std::integer_sequence<int, i...>) {
        (try_kernel.template operator()<i>(), ...);
    }(std::make_integer_sequence<int, std::size(kTable)>());
    return error;
}

constexpr cudaError_t kDoesNotFit = cudaErrorInvalidClusterSize;

// As many blocks as run at the same time, `wanted` at most: each works on many rows.
template <class... Params, class... Args>
cudaError_t launch_all_resident(void (*kernel)(Params...), const BlockShape& shape, std::int64_t wanted,
                                cudaStream_t stream, const Args&... args) {
    std::int64_t resident = 0;
    const void* const code = reinterpret_cast<const void*>(kernel);
    BlockShape alone = shape;
    alone.overlaps = false;
    cudaError_t error = find_resident_blocks(code, alone, resident);
    bool overlaps = false;
    if (error == cudaSuccess && shape.overlaps) error = find_hopper_code(code, overlaps);
    if (error != cudaSuccess) return error;
    const std::int64_t most = std::min<std::int64_t>(resident, kMaxBlocks / shape.cluster * shape.cluster);
    if (most == 0) return kDoesNotFit;  // so much shared memory, or so large a cluster
    alone.overlaps = overlaps;
    const ClusterLaunch launch(alone, std::clamp<std::int64_t>(wanted, shape.cluster, most), stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// A kernel whose warps work on tiles.
template <class Args>
cudaError_t launch_tiles_resident(void (*kernel)(Args), const Args& args, cudaStream_t stream) {
    const bool overlaps = args.out.follows_weights;
    const RegisterPlan& plan = args.plan;
    constexpr int warps = kTileThreads / 32;
    const std::int64_t tiles = divide_up(args.problem.rows(), plan.tile_rows);
    return launch_all_resident(kernel, {kTileThreads, warps * 2 * plan.tile_bytes + plan.slot_bytes, 1, overlaps},
                               divide_up(tiles, warps), stream, args);
}

// A kernel of a RowTeam, or of another whose teams are like those. overlaps: whether it waits for the kernel before it.
// Clusters begin after it: where its blocks have been, there might be no room for one until others end.
template <class Args>
cudaError_t launch_rows_resident(void (*kernel)(Args), const Args& args, cudaStream_t stream, bool overlaps = false) {
    const RegisterPlan& plan = args.plan;
    const int at_once = plan.is_column || plan.lanes == 32 ? plan.threads / plan.lanes : 1;
    const std::int64_t wanted = divide_up(args.problem.rows(), at_once) * plan.cluster;
    return launch_all_resident(kernel, {plan.threads, plan.slot_bytes, plan.cluster, overlaps && plan.cluster == 1},
                               wanted, stream, args);
}

// plan_for(multiprocessors) and, if there is a plan, launch().
template <class Plan, class Launch>
cudaError_t launch_in_tiles(RegisterPlan& plan, Plan plan_for, Launch launch) {
    int multiprocessors = 0;
    const cudaError_t error = find_multiprocessors(multiprocessors);
    if (error != cudaSuccess) return error;
    return (plan = plan_for(multiprocessors)) ? launch() : kDoesNotFit;
}

// launch() with plan_for(largest cluster), smaller ones where the device cannot place it.
template <class Plan, class Launch>
cudaError_t launch_in_clusters(RegisterPlan& plan, Plan plan_for, Launch launch) {
    for (int largest = kMaxCluster; largest > 0; largest /= 2) {
        if (!(plan = plan_for(largest))) continue;
        if (const cudaError_t error = launch(); error != kDoesNotFit) return error;
    }
    return kDoesNotFit;
}

// By the first kernel of that kind that has room for the rows; kDoesNotFit if none has. The others launch
// the kernel of args.plan.
template <class Tiles, class Columns, class Rows>
cudaError_t launch_held(RegisterArgs& args, KernelKind kind, Tiles launch_tiles, Columns launch_columns,
                        Rows launch_rows) {
    const RowProblem& p = args.problem;
    RegisterPlan& plan = args.plan;
    const cudaError_t error =
        launch_in_tiles(plan, [&](int multiprocessors) { return plan_tiles(p, kind, multiprocessors); }, launch_tiles);
    if (error != kDoesNotFit) return error;
    if ((plan = plan_columns(p, kind))) return launch_columns();
    return launch_in_clusters(plan, [&](int largest) { return plan_direct(p, kind, largest); }, launch_rows);
}

}  // namespace fused_losses::cuda
