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

// Combines what the blocks of the cluster bring, each the same in all of its threads, in the order of their ranks.
// `turn` alternates between calls: who is late reads one place while the others write to the other.
template <class T, class Combine>
FL_DEVICE void combine_over_cluster(T& x, int turn, Combine combine) {
    const int size = cluster_size(), me = threadIdx.x;
    if (size == 1) return;
    __shared__ T of_block[2], of_cluster[kMaxCluster];
    if (me == 0) of_block[turn] = x;
    sync_cluster();
    if (me < size) of_cluster[me] = of_rank(of_block[turn], me);  // all at once: other blocks are far away
    __syncthreads();  // of_cluster is written again after another sync_cluster()
    x = of_cluster[0];
    for (int rank = 1; rank < size; ++rank) combine(x, of_cluster[rank]);
}

}  // namespace fused_losses::cuda
