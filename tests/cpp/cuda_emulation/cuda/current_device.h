// Stands in for csrc's header of this name: the device is the host, its memory that of tensors on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/tensor.h"

namespace fused_losses::cuda {

inline void check_launch(cudaError_t error) {
    check(error == cudaSuccess, "fused_losses: CUDA error: ", static_cast<int>(error));
}

class DeviceScope {
public:
    explicit DeviceScope(int) {}

    cudaStream_t stream() const { return nullptr; }
    int index() const { return 0; }
    Tensor scratch(std::int64_t size, DtypeCode dtype) const {
        return empty(Sizes(&size, 1), dtype, {aoti_torch_device_type_cpu(), 0});
    }
};

}  // namespace fused_losses::cuda
