// Blocks that work together on one result. Counters start at zero and are used once per launch.
#pragma once

#include "cuda/launch.cuh"

namespace fused_losses::cuda {

// For all threads of a block, after they wrote their partial results: is this the last of `blocks` blocks to arrive?
__device__ __forceinline__ bool arrives_last(unsigned* ticket, std::int64_t blocks) {
    __shared__ bool last;
    __threadfence();  // this thread's writes are visible to the device
    __syncthreads();  // ... and those of the whole block, before the ticket is drawn
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == static_cast<unsigned>(blocks - 1);
    __syncthreads();
    __threadfence();  // what others wrote before their ticket is read after ours
    return last;
}

// Every thread of the grid waits for all others; for kernels launched by launch_cooperative().
__device__ __forceinline__ void wait_for_grid(unsigned* arrived) {
    __threadfence();
    __syncthreads();
    if (gridDim.x > 1 && threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(100);
    }
    __syncthreads();
    __threadfence();
}

}  // namespace fused_losses::cuda
