// Stands in for the CUDA toolkit's header of this name when g++ compiles kernels for the host; no toolkit is needed.
// The language's qualifiers, the functions of device code, and as much of the runtime as the kernels' launches use.
#pragma once

#include "device_functions.h"
#include "scheduler.h"

// Before the words below are macros: the standard library's attributes are made of some of them.
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

// Dynamic shared memory is what headers declare in this namespace, not in a function of a kernel:
//     extern __shared__ uint4 dynamic_shared[];
namespace fused_losses::cuda {
inline constexpr std::size_t kMostDynamicShared = 64 * 1024;
inline thread_local uint4 dynamic_shared[kMostDynamicShared / sizeof(uint4)];
}  // namespace fused_losses::cuda

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorAssert = 710,
    cudaErrorCooperativeLaunchTooLarge = 720,
    cudaErrorInvalidClusterSize = 912
};
using cudaStream_t = void*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// A device with room for so many blocks at the same time.
namespace cuda_emulation {
inline int device = 0, multiprocessors = 3, blocks_per_multiprocessor = 2;
inline int shared_per_block = int(fused_losses::cuda::kMostDynamicShared),
           shared_per_multiprocessor = 2 * shared_per_block;
inline unsigned largest_cluster = 16;       // that it can launch; 1 without clusters
inline unsigned widest_launch = 0;          // the largest cluster so far
inline int ptx_version = 90;                // of kernels
inline long questions = 0;                  // to the driver so far: what a launch can do without
inline std::set<const void*> non_portable;  // kernels that may have clusters of more than 8 blocks
}  // namespace cuda_emulation

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrReservedSharedMemoryPerBlock = 111,
    cudaDevAttrClusterLaunch = 120
};

struct cudaFuncAttributes {
    std::size_t sharedSizeBytes;
    int ptxVersion;
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};

inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_emulation::device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    ++cuda_emulation::questions;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = cuda_emulation::multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = cuda_emulation::shared_per_multiprocessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_emulation::shared_per_block; break;
        case cudaDevAttrReservedSharedMemoryPerBlock: *value = 0; break;
        case cudaDevAttrClusterLaunch: *value = cuda_emulation::largest_cluster > 1; break;
    }
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
    *attributes = {0, cuda_emulation::ptx_version};
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
        cuda_emulation::non_portable.insert(reinterpret_cast<const void*>(kernel));
        return cudaSuccess;
    }
    return value <= cuda_emulation::shared_per_block ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t bytes) {
    ++cuda_emulation::questions;
    const bool fits = bytes <= std::size_t(cuda_emulation::shared_per_block);
    *blocks = fits ? cuda_emulation::blocks_per_multiprocessor : 0;
    return cudaSuccess;
}

enum cudaLaunchAttributeID {
    cudaLaunchAttributeCooperative = 2,
    cudaLaunchAttributeClusterDimension = 4,
    cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

union cudaLaunchAttributeValue {
    int cooperative, programmaticStreamSerializationAllowed;
    struct {
        unsigned x, y, z;
    } clusterDim;
};

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace cuda_emulation {
template <class Kernel>
bool can_have_cluster(Kernel* kernel, unsigned size) {
    return size <= largest_cluster && (size <= 8 || non_portable.contains(reinterpret_cast<const void*>(kernel)));
}
}  // namespace cuda_emulation

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel* kernel, const cudaLaunchConfig_t* config) {
    using namespace cuda_emulation;
    ++questions;
    const unsigned size = config->attrs[0].val.clusterDim.x;
    if (!can_have_cluster(kernel, size)) return cudaErrorInvalidClusterSize;
    const int share = shared_per_multiprocessor / std::max(int(config->dynamicSmemBytes), 1);
    *count = multiprocessors * std::min(blocks_per_multiprocessor, share) / int(size);
    return cudaSuccess;
}

namespace cuda_emulation {

// A kernel as nvcc compiled it (cuda_compiled/), which takes pointers to its arguments, in the place of its source.
using Kernel = void (*)(const void* const*);
inline Kernel (*compiled_kernel)(const void* source) = nullptr;

struct CompiledKernel {
    CompiledKernel(const char* name, Kernel kernel);
};

}  // namespace cuda_emulation

// The kernel has run when this returns.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    bool cooperative = false, overlaps = false;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = config->attrs[i];
        if (attribute.id == cudaLaunchAttributeCooperative) cooperative |= attribute.val.cooperative != 0;
        if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
        if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
            overlaps |= attribute.val.programmaticStreamSerializationAllowed != 0;
    }
    if (overlaps && cluster > 1) cuda_emulation::die("clusters that overlap may find no room until others end");
    cuda_emulation::overlaps = overlaps;
    cuda_emulation::widest_launch = std::max(cuda_emulation::widest_launch, cluster);
    const unsigned resident = cuda_emulation::multiprocessors * cuda_emulation::blocks_per_multiprocessor;
    if (cooperative && config->gridDim.x > std::min(resident, cuda_emulation::room))
        return cudaErrorCooperativeLaunchTooLarge;
    if (config->dynamicSmemBytes > std::size_t(cuda_emulation::shared_per_block)) return cudaErrorInvalidValue;
    if (cluster > 1 && !cuda_emulation::can_have_cluster(kernel, cluster)) return cudaErrorInvalidClusterSize;
    if (config->gridDim.x % cluster != 0) return cudaErrorInvalidValue;
    [&](Params... converted) {
        const void* const arguments[] = {static_cast<const void*>(&converted)..., nullptr};
        std::function<void()> run = [&] { kernel(converted...); };
        if (cuda_emulation::compiled_kernel)
            run = [&, it = cuda_emulation::compiled_kernel(reinterpret_cast<const void*>(kernel))] { it(arguments); };
        cuda_emulation::run_launch(
            [&] { cuda_emulation::launch(config->gridDim, config->blockDim, cluster, cooperative, run); });
    }(std::forward<Args>(args)...);
    return std::exchange(cuda_emulation::has_failed, false) ? cudaErrorAssert : cudaSuccess;
}

// ---- What only the operators ask for (operators.cpp) ---------------------------------------------------------------

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    static std::atomic<unsigned> asked = 0;  // one in three calls is told so, and takes other counters
    *status = asked++ % 3 > 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
    *id = 1;
    return cudaSuccess;
}
template <class Symbol>
cudaError_t cudaGetSymbolAddress(void** address, Symbol& symbol) {
    *address = &symbol;
    return cudaSuccess;
}
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
constexpr unsigned cudaHostAllocPortable = 1;
inline cudaError_t cudaHostAlloc(void** memory, std::size_t size, unsigned) {
    *memory = std::malloc(size);
    return *memory ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t size, cudaStream_t) {
    std::memset(to, value, size);
    return cudaSuccess;
}
