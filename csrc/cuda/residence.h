// Planning of launches whose kernels hold their rows in shared memory: how many rows at a time, how many blocks for a
// row, from what the device offers. Host code.
#pragma once

#include <algorithm>
#include <bit>

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
    int blocks_with(std::int64_t bytes) const {
        if (bytes > per_block) return 0;
        return static_cast<int>(std::min<std::int64_t>(blocks, per_multiprocessor / (bytes + fixed)));
    }
    int enough() const { return std::min(blocks, kEnoughBlocks); }
    int useful_with(std::int64_t bytes) const { return std::min(enough(), blocks_with(bytes)); }

    // Blocks on the whole device at the same time, so many of them on a multiprocessor.
    std::int64_t on_device(int cluster, int on_multiprocessor) const {
        if (cluster == 1 || on_multiprocessor == 0) return std::int64_t(multiprocessors) * on_multiprocessor;
        const int size = std::countr_zero(static_cast<unsigned>(cluster)) - 1;
        return std::int64_t(cluster) * clusters[size][std::min(on_multiprocessor, kEnoughBlocks) - 1];
    }
};

// Finds it for a kernel on the current device and lets the kernel ask for all of it.
cudaError_t find_room(const void* kernel, Room& room);

template <class... Params>
cudaError_t find_room(void (*kernel)(Params...), Room& room) {
    return find_room(reinterpret_cast<const void*>(kernel), room);
}

// A launch of `blocks` blocks in clusters, each with so much dynamic shared memory. Not to be copied: it points into
// itself.
struct ClusterLaunch {
    cudaLaunchAttribute cluster = {};
    cudaLaunchConfig_t config = {};

    ClusterLaunch(int size, std::int64_t bytes, std::int64_t blocks, cudaStream_t stream) {
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(size);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(kBlock);
        config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = size > 1 ? 1 : 0;
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

// ---- Rows ----------------------------------------------------------------------------------------------------------

struct RowPlan {
    Residence residence;
    int cluster = 1;
    std::int64_t bytes = 0;  // per block
};

// For rows of classes that lie side by side; `groups` of a block work on one each, or up to kMaxCluster blocks on one.
inline RowPlan plan_rows(const Room& room, std::int64_t classes, int element, int groups) {
    const std::int64_t vector = 16 / element;
    RowPlan best;
    std::int64_t most = 0;
    for (int cluster = 1; cluster <= (groups == 1 ? kMaxCluster : 1); cluster *= 2) {
        // Room for a row that begins just before a 16-byte boundary.
        const std::int64_t vectors = (classes + 2 * (vector - 1)) / vector;
        const std::int64_t capacity = (vectors + cluster - 1) / cluster * vector, bytes = capacity * element * groups;
        const int blocks = room.useful_with(bytes);
        if (room.on_device(cluster, blocks) <= most) continue;
        most = room.on_device(cluster, blocks);
        const int buffers = room.useful_with(2 * bytes) == blocks ? 2 : 1;
        best = {{0, static_cast<int>(capacity), buffers, 0, 0}, cluster, buffers * bytes};
        if (blocks == room.enough()) break;
    }
    return best;
}

// ---- Pixels --------------------------------------------------------------------------------------------------------

// From one class of a tile to the next, in elements: room for the pixels and, unless all classes begin at 16-byte
// boundaries, for what else is in their first and last 16 bytes; classes are as misaligned in the tile as in memory.
inline int pitch_of(const RowProblem& p, int pixels, int element) {
    const int vector = 16 / element, misaligned = static_cast<int>(p.logits_class_stride % vector);
    const bool aligned =
        misaligned == 0 && p.logits_stride.outer % vector == 0 && reinterpret_cast<std::uintptr_t>(p.logits) % 16 == 0;
    return aligned ? pixels : pixels + vector + misaligned;
}

inline RowPlan plan_pixels(const Room& room, const RowProblem& p, int element) {
    constexpr int fewest = 32;  // a warp, or more, reads neighbours
    const int vector = 16 / element;
    RowPlan best;
    int most = 0;
    for (int pixels = kBlock; pixels >= fewest; pixels /= 2) {
        if (pixels > fewest && pixels / 2 >= p.inner) continue;  // half of them are enough for an image
        const int pitch = pitch_of(p, pixels, element);
        const std::int64_t bytes = ((p.num_classes - 1) * pitch + pixels + 2 * vector) * element;
        const int blocks = room.useful_with((bytes + 15) / 16 * 16);
        if (blocks <= most) continue;
        most = blocks;
        best = {{0, 0, 0, pixels, pitch}, 1, (bytes + 15) / 16 * 16};
    }
    return best;
}

// Whether neighbouring rows are side by side in memory and have more classes than registers or the first cache can hold
// for a thread.
inline bool has_pixels(const RowProblem& p) {
    return p.logits_stride.inner == 1 && p.inner >= 16 && p.num_classes > kFewClasses;
}

}  // namespace fused_losses::cuda
