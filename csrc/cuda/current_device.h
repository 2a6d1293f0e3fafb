// Device and stream of a call. Nothing here is linked against torch's CUDA library: a CPU build of torch loads this
// one.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "ops/tensor.h"

namespace fused_losses::cuda {

inline void check_launch(cudaError_t error) {
    check(error == cudaSuccess, "fused_losses: CUDA error: ", cudaGetErrorString(error));
}

// Makes a device current for torch and for this library, which carries its own copy of the CUDA runtime.
class DeviceScope {
public:
    explicit DeviceScope(int index) : device{aoti_torch_device_type_cuda(), index} {
        check_torch(aoti_torch_create_device_guard(index, &guard), "make a device current");
        if (const cudaError_t error = cudaSetDevice(index); error != cudaSuccess) {
            aoti_torch_delete_device_guard(guard);
            check_launch(error);
        }
    }
    ~DeviceScope() { aoti_torch_delete_device_guard(guard); }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

    // torch's current stream, in which its allocator reuses memory.
    cudaStream_t stream() const {
        using Find = AOTITorchError (*)(std::int32_t, void**);
        static const auto find = reinterpret_cast<Find>(symbol_of_torch_cuda("aoti_torch_get_current_cuda_stream"));
        void* stream = nullptr;
        check_torch(find(device.index, &stream), "tell its current stream");
        return static_cast<cudaStream_t>(stream);
    }

    int index() const { return device.index; }

    Tensor scratch(std::int64_t size, DtypeCode dtype) const { return empty(Sizes(&size, 1), dtype, device); }

private:
    // Of the library that a CUDA build of torch has loaded, which is not among the names that everybody sees.
    static void* symbol_of_torch_cuda(const char* name) {
        void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* const symbol = dlsym(library ? library : RTLD_DEFAULT, name);
        check(symbol, "fused_losses: this torch has no ", name);
        return symbol;
    }

    Device device;
    DeviceGuardHandle guard = nullptr;
};

}  // namespace fused_losses::cuda
