// Device and stream of a call, without CUDA headers of torch: compiles and links against a CPU build of torch, too; at
// run time the CUDA build registers the device guard used here.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime_api.h>

namespace fused_losses::cuda {

inline void check_launch(cudaError_t error) {
    TORCH_CHECK(error == cudaSuccess, "fused_losses: CUDA error: ", cudaGetErrorString(error));
}

// Makes a device current for torch and for this library, which carries its own copy of the CUDA runtime.
class DeviceScope {
public:
    explicit DeviceScope(int index)
        : device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)), guard(device) {
        check_launch(cudaSetDevice(index));
    }

    // torch's current stream, in which its allocator reuses memory.
    cudaStream_t stream() const {
        const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
        return static_cast<cudaStream_t>(impl.getStream(device).native_handle());
    }

    int index() const { return device.index(); }

    at::Tensor scratch(std::int64_t size, at::ScalarType dtype) const {
        return at::empty({size}, at::TensorOptions().device(device).dtype(dtype));
    }

private:
    c10::Device device;
    c10::DeviceGuard guard;
};

}  // namespace fused_losses::cuda
