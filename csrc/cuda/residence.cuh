// Planning and launching of kernels that hold their rows in shared memory: how many rows at a time, how many blocks for
// a row, from what the device offers.
#pragma once

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

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

// How many clusters can run at the same time; 0 where the device, or a part of it, cannot place one.
template <class Kernel>
int resident_clusters(Kernel* kernel, int size, std::int64_t bytes) {
    const ClusterLaunch launch(size, bytes, size, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess) return clusters;
    cudaGetLastError();  // an answer, not a failure
    return 0;
}

// More than 8 blocks only with the kernel's leave, and not on every device.
template <class Kernel>
void ask_for_clusters(Kernel* kernel, Room& room) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
        cudaGetLastError();  // then there are none of 16
    for (int size = 2; size <= kMaxCluster; size *= 2)
        for (int blocks = 1; blocks <= room.enough(); ++blocks) {
            const int share = room.per_multiprocessor / blocks / 1024 * 1024;  // more than the unit of allocation
            room.clusters[std::countr_zero(static_cast<unsigned>(size)) - 1][blocks - 1] =
                resident_clusters(kernel, size, std::clamp(share - room.fixed, 0, room.per_block));
        }
}

// Also lets the kernel ask for all of it.
template <class Kernel>
cudaError_t ask_for_room(Kernel* kernel, int device, Room& room) {
    int optin = 0, reserved = 0, clusters = 0;
    cudaFuncAttributes function = {};
    cudaError_t error = cudaSuccess;
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
    };
    ask(&room.multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&room.per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
    ask(&clusters, cudaDevAttrClusterLaunch);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&function, kernel);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room.blocks, kernel, kBlock, 0);
    const int fixed = static_cast<int>(function.sharedSizeBytes);
    room.per_block = optin - fixed;
    room.fixed = fixed + reserved;
    // All there is, not what one launch needs: other threads may be launching the kernel, too.
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.per_block);
    // Compiled for less, a kernel knows no clusters.
    if (error == cudaSuccess && clusters != 0 && function.ptxVersion >= 90) ask_for_clusters(kernel, room);
    return error;
}

// Remembers the answer: a small kernel takes less time than so many questions.
template <class Kernel>
cudaError_t find_room(Kernel* kernel, Room& room) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    static std::mutex mutex;
    static std::map<std::pair<Kernel*, int>, Room> known;
    const std::lock_guard lock(mutex);
    const auto found = known.find({kernel, device});
    if (found != known.end()) {
        room = found->second;
        return cudaSuccess;
    }
    const cudaError_t error = ask_for_room(kernel, device, room);
    if (error == cudaSuccess) known[{kernel, device}] = room;
    return error;
}

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

// ---- Launches ------------------------------------------------------------------------------------------------------

// As many blocks as are resident at the same time, `wanted` at most: each works on many rows.
template <class... Params, class... Args>
cudaError_t launch_resident(void (*kernel)(Params...), const Room& room, const RowPlan& plan, std::int64_t wanted,
                            cudaStream_t stream, const Args&... args) {
    const std::int64_t resident = room.on_device(plan.cluster, room.blocks_with(plan.bytes));
    const std::int64_t most = std::min<std::int64_t>(resident, kMaxBlocks / plan.cluster * plan.cluster);
    const std::int64_t blocks = std::clamp<std::int64_t>(wanted, plan.cluster, most);
    const ClusterLaunch launch(plan.cluster, plan.bytes, blocks, stream);
    return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

// Launches a kernel that reads rows by RowReader, each by so many threads.
template <class Stored, class A>
cudaError_t launch_rows(void (*kernel)(RowArgs<A>), int threads, RowArgs<A>& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    const int groups = kBlock / threads;
    RowPlan plan;
    Room room;
    if (threads >= 32 && p.logits_class_stride == 1) {
        if (const cudaError_t error = find_room(kernel, room); error != cudaSuccess) return error;
        plan = plan_rows(room, p.num_classes, sizeof(Stored), groups);
    }
    args.residence = plan.residence;
    args.residence.threads = threads;
    if (plan.bytes == 0) return launch(kernel, blocks_for(p.rows(), groups), stream, args);
    return launch_resident(kernel, room, plan, (p.rows() + groups - 1) / groups * plan.cluster, stream, args);
}

// Launches a kernel that reads rows by PixelTiles.
template <class Stored, class A>
cudaError_t launch_pixels(void (*kernel)(RowArgs<A>), RowArgs<A>& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    RowPlan plan;
    Room room;
    if (has_pixels(p)) {
        if (const cudaError_t error = find_room(kernel, room); error != cudaSuccess) return error;
        plan = plan_pixels(room, p, sizeof(Stored));
    }
    if (plan.bytes == 0) return launch(kernel, blocks_for(p.rows(), kBlock), stream, args);
    args.residence = plan.residence;
    const std::int64_t pixels = plan.residence.pixels;
    return launch_resident(kernel, room, plan, p.outer * ((p.inner + pixels - 1) / pixels), stream, args);
}

}  // namespace fused_losses::cuda
