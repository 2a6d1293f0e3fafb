// Stands in for the CUDA toolkit's header of this name when g++ compiles kernels for the host; no toolkit is needed.
// The language's qualifiers, the functions of device code, and as much of the runtime as the kernels' launches use.
#pragma once

#include "device_functions.h"
#include "scheduler.h"

#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

// Dynamic shared memory is what headers declare in this namespace, not in a function of a kernel:
//     extern __shared__ uint4 dynamic_shared[];
namespace fused_losses::cuda {
inline constexpr std::size_t kMostDynamicShared = 64 * 1024;
inline thread_local uint4 dynamic_shared[kMostDynamicShared / sizeof(uint4)];
}  // namespace fused_losses::cuda

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
using cudaStream_t = void*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// A device with room for so many blocks at the same time.
namespace cuda_emulation {
inline int multiprocessors = 3, blocks_per_multiprocessor = 2;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = cuda_emulation::multiprocessors;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    *blocks = cuda_emulation::blocks_per_multiprocessor;
    return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };

union cudaLaunchAttributeValue {
    int cooperative;
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

// The kernel has run when this returns.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
    bool cooperative = false;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative |= config->attrs[i].val.cooperative != 0;
    const unsigned resident = cuda_emulation::multiprocessors * cuda_emulation::blocks_per_multiprocessor;
    if (cooperative && config->gridDim.x > resident) return cudaErrorCooperativeLaunchTooLarge;
    if (config->dynamicSmemBytes > fused_losses::cuda::kMostDynamicShared) return cudaErrorInvalidValue;
    [&](Params... converted) {
        cuda_emulation::launch(config->gridDim, config->blockDim, cooperative, [&] { kernel(converted...); });
    }(std::forward<Args>(args)...);
    return cudaSuccess;
}
