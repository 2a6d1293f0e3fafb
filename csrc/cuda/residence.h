// Planning of launches whose kernels hold their rows in shared memory: how many rows at a time, how many blocks for a
// row, from what the device offers. Host code.
#pragma once

#include "cuda/launch.cuh"

namespace fused_losses::cuda {

// How shared memory holds rows while they are worked on: a buffer or two for each group of
// threads, or a tile of pixels. All zeros: rows are read where they lie, as often as they are needed.
struct Residence {
    int threads = 0;                // of a group: a warp or a block
    int capacity = 0, buffers = 0;  // elements per buffer, of the row's part that a block of a cluster has
    int pixels = 0, pitch = 0;      // elements from one class to the next
};

constexpr int kMaxCluster = 16;   // blocks
constexpr int kEnoughBlocks = 3;  // on a multiprocessor, to copy, compute and write at the same time; more is no gain

// What a kernel finds on its device. Memory in bytes, without the kernel's static shared memory.
struct Room {
    int multiprocessors = 1;
    int blocks = 1;                         // that fit on a multiprocessor by their registers
    int per_block = 0;                      // shared memory that a block may ask for
    int per_multiprocessor = 0, fixed = 0;  // what all blocks share, and what each takes without asking
    // [s][b]: how many clusters of 2^(s+1) blocks, up to kMaxCluster, run at the same time where b + 1 of these blocks
    // fit on a multiprocessor.
    int clusters[4][kEnoughBlocks] = {};

    // Blocks on a multiprocessor that ask for so much.
    int blocks_with(std::int64_t bytes) const;
    int enough() const;
    int useful_with(std::int64_t bytes) const;
    // Blocks on the whole device at the same time, so many of them on a multiprocessor.
    std::int64_t on_device(int cluster, int on_multiprocessor) const;
};

// Finds it for a kernel on the current device and lets the kernel ask for all of it.
cudaError_t find_room(const void* kernel, Room& room);

template <class... Params>
cudaError_t find_room(void (*kernel)(Params...), Room& room) {
    return find_room(reinterpret_cast<const void*>(kernel), room);
}

// A launch of `blocks` blocks in clusters. Not to be copied: it points into itself.
struct ClusterLaunch {
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = {};

    ClusterLaunch(const BlockShape& shape, std::int64_t blocks, cudaStream_t stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(shape.threads);
        config.dynamicSmemBytes = static_cast<std::size_t>(shape.bytes);
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = shape.cluster > 1 ? 1 : 0;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

struct RowPlan {
    Residence residence;
    int cluster = 1;
    std::int64_t bytes = 0;  // per block
};

// For rows of classes that lie side by side; `groups` of a block work on one each, or up to kMaxCluster blocks on one.
RowPlan plan_rows(const Room& room, std::int64_t classes, int element, int groups);

// Whether neighbouring rows are side by side in memory and have more classes than registers or the first cache can hold
// for a thread.
bool has_pixels(const RowProblem& p);

// For a tile of such pixels.
RowPlan plan_pixels(const Room& room, const RowProblem& p, int element);

// As many blocks as are resident at the same time, `wanted` at most: each works on many rows.
std::int64_t resident_blocks(const Room& room, const RowPlan& plan, std::int64_t wanted);

}  // namespace fused_losses::cuda
