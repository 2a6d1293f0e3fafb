// How many blocks of a kernel a device runs at the same time.
#include <utility>

#include "cuda/launch.cuh"
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

}  // namespace

cudaError_t find_multiprocessors(int& count) {
    static auto& known = *new PerDevice<int>;
    return known.find(nullptr, count, [](int device, int& answer) {
        return cudaDeviceGetAttribute(&answer, cudaDevAttrMultiProcessorCount, device);
    });
}

cudaError_t find_hopper_code(const void* kernel, bool& has) {
    static auto& known = *new PerDevice<bool, const void*>;
    return known.find(kernel, has, [&](int, bool& answer) {
        cudaFuncAttributes function = {};
        const cudaError_t error = cudaFuncGetAttributes(&function, kernel);
        answer = function.ptxVersion >= 90;
        return error;
    });
}

namespace {

constexpr int kSharedWithoutAsking = 16 * 1024;  // beside what the kernel has for itself, of 48 KB in all

// All there is, not what one launch needs: other threads may be launching the kernel, too.
cudaError_t allow_shared(const void* kernel) {
    int device = 0, most = 0;
    cudaFuncAttributes function = {};
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&function, kernel);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(function.sharedSizeBytes));
}

cudaError_t ask_for_blocks(const void* kernel, const BlockShape& shape, std::int64_t& blocks) {
    if (shape.cluster > 1) {
        bool has_clusters = false;
        blocks = 0;
        const cudaError_t error = find_hopper_code(kernel, has_clusters);
        if (error != cudaSuccess || !has_clusters) return error;
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
            cudaGetLastError();
        if (shape.bytes > kSharedWithoutAsking)
            if (const cudaError_t denied = allow_shared(kernel); denied != cudaSuccess) return denied;
        blocks = std::int64_t(shape.cluster) * resident_clusters(kernel, shape);
        return cudaSuccess;
    }
    int multiprocessors = 0, on_each = 0;
    cudaError_t error = find_multiprocessors(multiprocessors);
    if (error == cudaSuccess && shape.bytes > kSharedWithoutAsking) error = allow_shared(kernel);
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

}  // namespace fused_losses::cuda
