// Structs as tensors, for what calls say besides their tensors and say again and again: of a small call torch takes
// longer to hand over ten arguments than the operator takes to compute.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>

#include "ops/tensor.h"

namespace fused_losses {

template <class T>
Tensor pack(const T& constants) {
    static_assert(std::is_trivially_copyable_v<T>);
    const std::int64_t size[] = {sizeof(T)};
    Tensor packed = empty(size, dtypes::uint8, {aoti_torch_device_type_cpu(), 0});
    std::memcpy(packed.mutable_data_ptr(), &constants, sizeof(T));
    return packed;
}

// Nothing if the tensor cannot hold such a struct.
template <class T>
std::optional<T> unpack(const Tensor& packed) {
    const bool has_bytes = packed.dim() == 1 && packed.size(0) == sizeof(T) && packed.is_contiguous();
    if (!packed.is_cpu() || packed.dtype() != dtypes::uint8 || !has_bytes) return {};
    T constants;
    std::memcpy(&constants, packed.const_data_ptr(), sizeof(T));
    return constants;
}

}  // namespace fused_losses
