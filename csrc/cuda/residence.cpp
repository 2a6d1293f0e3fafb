// What kernels find on their devices, and how their launches use it.
#include "cuda/residence.h"

#include <algorithm>
#include <bit>

#include "cuda/per_device.h"

namespace fused_losses::cuda {
namespace {

// How many clusters can run at the same time; 0 where the device, or a part of it, cannot place one.
int resident_clusters(const void* kernel, const BlockShape& shape) {
    const ClusterLaunch launch(shape, shape.cluster, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess) return clusters;
    cudaGetLastError();  // an answer, not a failure
    return 0;
}

// More than 8 blocks only with the kernel's leave, and not on every device.
void ask_for_clusters(const void* kernel, Room& room) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
        cudaGetLastError();  // then there are none of 16
    for (int size = 2; size <= kMaxCluster; size *= 2)
        for (int blocks = 1; blocks <= room.enough(); ++blocks) {
            const int share = room.per_multiprocessor / blocks / 1024 * 1024;  // more than the unit of allocation
            room.clusters[std::countr_zero(static_cast<unsigned>(size)) - 1][blocks - 1] =
                resident_clusters(kernel, {kBlock, std::clamp(share - room.fixed, 0, room.per_block), size});
        }
}

cudaError_t ask_for_room(const void* kernel, int device, Room& room) {
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

}  // namespace

cudaError_t find_room(const void* kernel, Room& room) {
    static auto& known = *new PerDevice<Room>;
    return known.find(kernel, room, [&](int device, Room& answer) { return ask_for_room(kernel, device, answer); });
}

cudaError_t find_multiprocessors(int& count) {
    static auto& known = *new PerDevice<int>;
    return known.find(nullptr, count, [](int device, int& answer) {
        return cudaDeviceGetAttribute(&answer, cudaDevAttrMultiProcessorCount, device);
    });
}

namespace {

cudaError_t ask_for_blocks(const void* kernel, const BlockShape& shape, std::int64_t& blocks) {
    if (shape.cluster > 1) {
        cudaFuncAttributes function = {};
        const cudaError_t error = cudaFuncGetAttributes(&function, kernel);
        blocks = 0;
        if (error != cudaSuccess || function.ptxVersion < 90) return error;
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
            cudaGetLastError();
        blocks = std::int64_t(shape.cluster) * resident_clusters(kernel, shape);
        return cudaSuccess;
    }
    int multiprocessors = 0, on_each = 0;
    cudaError_t error = find_multiprocessors(multiprocessors);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, shape.threads, shape.bytes);
    blocks = std::int64_t(multiprocessors) * on_each;
    return error;
}

}  // namespace

cudaError_t find_resident_blocks(const void* kernel, const BlockShape& shape, std::int64_t& blocks) {
    static auto& known = *new PerDevice<std::int64_t, std::pair<const void*, BlockShape>>;
    return known.find({kernel, shape}, blocks,
                      [&](int, std::int64_t& answer) { return ask_for_blocks(kernel, shape, answer); });
}

int Room::blocks_with(std::int64_t bytes) const {
    if (bytes > per_block) return 0;
    return static_cast<int>(std::min<std::int64_t>(blocks, per_multiprocessor / (bytes + fixed)));
}

int Room::enough() const { return std::min(blocks, kEnoughBlocks); }

int Room::useful_with(std::int64_t bytes) const { return std::min(enough(), blocks_with(bytes)); }

std::int64_t Room::on_device(int cluster, int on_multiprocessor) const {
    if (cluster == 1 || on_multiprocessor == 0) return std::int64_t(multiprocessors) * on_multiprocessor;
    const int size = std::countr_zero(static_cast<unsigned>(cluster)) - 1;
    return std::int64_t(cluster) * clusters[size][std::min(on_multiprocessor, kEnoughBlocks) - 1];
}

RowPlan plan_rows(const Room& room, std::int64_t classes, int element, int groups) {
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

bool has_pixels(const RowProblem& p) {
    return p.logits_stride.inner == 1 && p.inner >= 16 && p.num_classes > kFewClasses;
}

namespace {

// From one class of a tile to the next, in elements: room for the pixels and, unless all classes begin at 16-byte
// boundaries, for what else is in their first and last 16 bytes; classes are as misaligned in the tile as in memory.
int pitch_of(const RowProblem& p, int pixels, int element) {
    const int vector = 16 / element, misaligned = static_cast<int>(p.logits_class_stride % vector);
    const bool aligned =
        misaligned == 0 && p.logits_stride.outer % vector == 0 && reinterpret_cast<std::uintptr_t>(p.logits) % 16 == 0;
    return aligned ? pixels : pixels + vector + misaligned;
}

}  // namespace

RowPlan plan_pixels(const Room& room, const RowProblem& p, int element) {
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

std::int64_t resident_blocks(const Room& room, const RowPlan& plan, std::int64_t wanted) {
    const std::int64_t resident = room.on_device(plan.cluster, room.blocks_with(plan.bytes));
    const std::int64_t most = std::min<std::int64_t>(resident, kMaxBlocks / plan.cluster * plan.cluster);
    return std::clamp<std::int64_t>(wanted, plan.cluster, most);
}

}  // namespace fused_losses::cuda
