// Blocks that work together on one result.
#pragma once

#include "core/loss_sums.h"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

// Two launches of which the second may begin while the first runs: the first lets it, and the second waits where it
// needs what the first has written, or may write what the first reads. It waits in any case, since whoever comes after
// it waits for it alone. Without such a launch both do nothing.
FL_DEVICE void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FL_DEVICE void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(FL_CUDA_EMULATION)
    cuda_emulation::current_block->has_waited = true;
#endif
}

// For all threads of a block, after they wrote their partial results: is this the last of `blocks` blocks to arrive?
// The ticket starts at zero, and is zero again once all have arrived.
FL_DEVICE bool arrives_last(unsigned* ticket, std::int64_t blocks) {
    __shared__ bool last;
    const auto highest = static_cast<unsigned>(blocks - 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what the block wrote is visible to the device before the ticket is drawn
        last = atomicInc(ticket, highest) == highest;
        __threadfence();  // what others wrote before their ticket is read after ours
    }
    __syncthreads();
    return last;
}

// As cooperative_groups::grid_group, for kernels launched by launch_cooperative(). The counter starts at zero. Each
// barrier turns its highest bit and leaves the others zero, so that it serves the next one, of any grid.
struct grid_group {
    unsigned* const arrived;

    // Every thread of the grid waits for all others.
    FL_DEVICE void sync() const {
        __syncthreads();
        if (gridDim.x > 1 && threadIdx.x == 0) {
            __threadfence();  // of what the whole block wrote
            constexpr unsigned highest = 1u << 31;
            const unsigned before = atomicAdd(arrived, blockIdx.x == 0 ? highest - (gridDim.x - 1) : 1u);
            while (((atomicAdd(arrived, 0u) ^ before) & highest) == 0) __nanosleep(100);
            __threadfence();  // for what the whole block will read
        }
        __syncthreads();
    }
};

// In lane 0; the others get some part of it.
FL_DEVICE LossSums sum_over_warp(LossSums x) {
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2)
        x.add({__shfl_down_sync(0xffffffffu, x.value, distance), __shfl_down_sync(0xffffffffu, x.weight, distance)});
    return x;
}

// For all threads of a block: their sum, in thread 0; the others get some part of it.
FL_DEVICE LossSums sum_over_block(LossSums sums) {
    __shared__ LossSums of_warp[kMostThreads / 32];
    const int me = threadIdx.x, warps = blockDim.x / 32;
    sums = sum_over_warp(sums);
    __syncthreads();  // an earlier result has been read
    if (me % 32 == 0) of_warp[me / 32] = sums;
    __syncthreads();
    if (me >= 32) return sums;
    return sum_over_warp(me < warps ? of_warp[me] : LossSums{0, 0});
}

// Of what blocks have left, shared by so many threads: a thread's share.
FL_DEVICE LossSums share_of_partials(const double* partials, std::int64_t count, int threads) {
    LossSums sums{0, 0};
#pragma unroll 4
    for (std::int64_t i = threadIdx.x; i < count; i += threads)
        sums.add({__ldcg(partials + 2 * i), __ldcg(partials + 2 * i + 1)});
    return sums;
}

// For all threads of a block, once `partials` [count] of all blocks are there: their sum, in thread 0.
FL_DEVICE LossSums sum_of_partials(const double* partials, std::int64_t count) {
    return sum_over_block(share_of_partials(partials, count, kBlock));
}

FL_DEVICE unsigned* ticket_of(const LossOutput& out) {
    static __device__ unsigned own[kTickets];
    return out.ticket ? out.ticket : own + out.own_ticket;
}

// For all threads of the grid: adds up what they bring, without atomics but a ticket, so that the order of additions
// follows from the size of the grid. Returns whether this thread is the one that has the sum.
FL_DEVICE bool sum_over_grid(LossSums& sums, const LossOutput& out) {
    sums = sum_over_block(sums);
    if (threadIdx.x >= 32) return false;  // one warp does the rest
    if (gridDim.x > 1) {
        bool last = false;
        if (threadIdx.x == 0) {
            out.partials[2 * std::int64_t(blockIdx.x)] = sums.value;
            out.partials[2 * std::int64_t(blockIdx.x) + 1] = sums.weight;
            __threadfence();
            last = atomicInc(ticket_of(out), gridDim.x - 1) == gridDim.x - 1;
        }
        if (!__shfl_sync(0xffffffffu, int(last), 0)) return false;
        __syncwarp();     // orders memory, which the shuffle does not
        __threadfence();  // what others wrote before their ticket is read after ours
        sums = sum_over_warp(share_of_partials(out.partials, gridDim.x, 32));
    }
    return threadIdx.x == 0;
}

// Nothing to average gives 0, not NaN.
FL_DEVICE double mean_of(double value, double weight) { return weight == 0 ? 0.0 : value / weight; }

}  // namespace fused_losses::cuda
