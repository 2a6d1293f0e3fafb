// Thread block clusters (sm_90 and newer): a few blocks that run at the same time and can read each other's shared
// memory. Elsewhere every block is a cluster of its own.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
FL_DEVICE int cluster_size() { return 1; }
FL_DEVICE int cluster_rank() { return 0; }
FL_DEVICE void sync_cluster() { __syncthreads(); }
template <class T>
FL_DEVICE const T& of_rank(const T& mine, int) {
    return mine;
}
#else
FL_DEVICE int cluster_size() { return static_cast<int>(__clusterSizeInBlocks()); }
FL_DEVICE int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
// A barrier for all threads of the cluster, after which each sees what the others have written to shared memory.
FL_DEVICE void sync_cluster() {
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}
// What block `rank` of the cluster has at the place of `mine`, a shared variable. That block must be running.
template <class T>
FL_DEVICE const T& of_rank(const T& mine, int rank) {
    return *static_cast<const T*>(__cluster_map_shared_rank(&mine, static_cast<unsigned>(rank)));
}
#endif

}  // namespace fused_losses::cuda
