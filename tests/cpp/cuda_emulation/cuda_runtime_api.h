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
// `extern __shared__ T name[]` wants a definition: see dynamic_shared.h.
#define __shared__ thread_local

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

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
    [&](Params... converted) {
        cuda_emulation::launch(config->gridDim, config->blockDim, cooperative, [&] { kernel(converted...); });
    }(std::forward<Args>(args)...);
    return cudaSuccess;
}

// The arguments come as pointers to values of exactly the parameters' types.
template <class... Params>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** args, std::size_t = 0,
                                        cudaStream_t = nullptr) {
    const auto call = [&]<std::size_t... i>(std::index_sequence<i...>) {
        kernel(*static_cast<std::remove_reference_t<Params>*>(args[i])...);
    };
    cuda_emulation::launch(grid, block, true, [&] { call(std::index_sequence_for<Params...>{}); });
    return cudaSuccess;
}
