// What kernels find on their devices.
#include "cuda/residence.h"

#include <map>
#include <mutex>
#include <utility>

namespace fused_losses::cuda {
namespace {

// How many clusters can run at the same time; 0 where the device, or a part of it, cannot place one.
int resident_clusters(const void* kernel, int size, std::int64_t bytes) {
    const ClusterLaunch launch(size, bytes, size, nullptr);
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
                resident_clusters(kernel, size, std::clamp(share - room.fixed, 0, room.per_block));
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

// Remembers the answer: a small kernel takes less time than so many questions.
cudaError_t find_room(const void* kernel, Room& room) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, Room> known;
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

}  // namespace fused_losses::cuda
