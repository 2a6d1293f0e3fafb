// Thread block clusters (sm_90 and newer): a few blocks that run at the same time and can read each other's shared
// memory. Elsewhere every block is a cluster of its own.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

// The part of cooperative_groups::cluster_group that is used here; its header takes as long to read as a kernel.
struct cluster_group {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    static FL_DEVICE int num_blocks() { return 1; }
    static FL_DEVICE int block_rank() { return 0; }
    static FL_DEVICE void sync() { __syncthreads(); }
    template <class T>
    static FL_DEVICE const T* map_shared_rank(const T* mine, int) {
        return mine;
    }
#else
    static FL_DEVICE int num_blocks() { return static_cast<int>(__clusterSizeInBlocks()); }
    static FL_DEVICE int block_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
    // After it each thread sees what the others have written to shared memory.
    static FL_DEVICE void sync() {
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
    }
    // Where block `rank` of the cluster, which must be running, has this shared variable.
    template <class T>
    static FL_DEVICE const T* map_shared_rank(const T* mine, int rank) {
        return static_cast<const T*>(__cluster_map_shared_rank(mine, static_cast<unsigned>(rank)));
    }
#endif
};

}  // namespace fused_losses::cuda
