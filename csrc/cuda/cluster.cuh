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

// A few numbers of each block that all blocks of the cluster get to know. The cluster's barrier would do, too, but
// before it every thread waits until all that it has written, gradients too, has reached device memory. So each block
// sends its numbers to the others, where a barrier of their own counts the bytes that arrive.
class ClusterExchange {
    static constexpr int kMostNumbers = 8;
    struct Shared {
        unsigned long long arrived[2];
        float of_block[2][kMostNumbers][kMaxCluster];
    };
    static FL_DEVICE Shared& shared() {
        __shared__ Shared of_block;
        return of_block;
    }

public:
    // For all threads of the cluster, before the first exchange; and after the last, since nobody may send anything to
    // a block that has finished.
    static FL_DEVICE void begin() {
        if (cluster_group::num_blocks() == 1) return;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (threadIdx.x == 0) {
            for (unsigned long long& barrier : shared().arrived)
                asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&barrier)) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
#endif
        cluster_group::sync();
    }
    static FL_DEVICE void end() {
        if (cluster_group::num_blocks() > 1) cluster_group::sync();
    }

    // For all threads, x the same in all of a warp. Then lane i of every warp has x of block i, or `nothing`. `use`
    // counts the exchanges; between two of them the block's threads wait for each other, so that all have read the
    // numbers of one before the numbers of the next but one arrive in their place.
    template <int n>
    static FL_DEVICE void gather(float (&x)[n], float nothing, unsigned use) {
        static_assert(n <= kMostNumbers);
        const int me = threadIdx.x % 32, blocks = cluster_group::num_blocks();
        auto& numbers = shared().of_block[use % 2];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        const unsigned barrier = address_of(&shared().arrived[use % 2]);
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                         "r"(blocks * n * static_cast<int>(sizeof(float)))
                         : "memory");
        if (static_cast<int>(threadIdx.x) < blocks) {
            const unsigned of_other = address_in(me, barrier);
#pragma unroll
            for (int i = 0; i < n; ++i)
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                                 address_in(me, address_of(&numbers[i][cluster_group::block_rank()]))),
                             "r"(__float_as_uint(x[i])), "r"(of_other)
                             : "memory");
        }
        // What is read next lies in this block's shared memory. Waiting with the cluster's scope would empty the L1
        // cache.
        for (unsigned done = 0; !done;)
            asm volatile(
                "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                : "=r"(done)
                : "r"(barrier), "r"(use / 2 % 2)
                : "memory");
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = me < blocks ? numbers[i][me] : nothing;
#else
        for (int i = 0; i < n; ++i)
            if (threadIdx.x == 0) numbers[i][0] = x[i];
        cluster_group::sync();
        for (int i = 0; i < n; ++i) x[i] = me < blocks ? *cluster_group::map_shared_rank(&numbers[i][0], me) : nothing;
#endif
    }

private:
#ifdef __CUDA_ARCH__
    static FL_DEVICE unsigned address_of(const void* shared) {
        return static_cast<unsigned>(__cvta_generic_to_shared(shared));
    }
    static FL_DEVICE unsigned address_in(int block, unsigned address) {
        unsigned there;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
        return there;
    }
#endif
};

}  // namespace fused_losses::cuda
