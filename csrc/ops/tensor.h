// torch's tensors, through the C functions that torch keeps compatible between its versions (torch/csrc/stable): one
// binary runs under every torch.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <ostream>
#include <span>
#include <utility>

#include "core/elements.h"
#include "ops/error.h"

// Since torch 2.13; null in older ones.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace fused_losses {

// torch's functions return an error code.
inline void check_torch(AOTITorchError code, const char* what) {
    if (code == AOTI_TORCH_SUCCESS) [[likely]]
        return;
    if (torch_exception_get_what_without_backtrace)
        fail<std::runtime_error>(torch_exception_get_what_without_backtrace());
    fail<std::runtime_error>("fused_losses: torch could not ", what, "; its message is on stderr");
}

struct Sizes : std::span<const std::int64_t> {
    using span::span;

    friend bool operator==(const Sizes& a, const Sizes& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end());
    }

    friend std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
        out << '[';
        for (std::size_t d = 0; d < sizes.size(); ++d) out << (d > 0 ? ", " : "") << sizes[d];
        return out << ']';
    }
};

// Sizes with memory of their own.
class Shape {
public:
    static constexpr std::size_t kMaxDims = 64;  // as many as torch's own operators take

    void push_back(std::int64_t size) {
        check(count < kMaxDims, "tensors must have at most ", kMaxDims, " dimensions");
        values[count++] = size;
    }

    operator Sizes() const { return {values, count}; }
    std::int64_t& operator[](std::size_t d) { return values[d]; }

private:
    std::int64_t values[kMaxDims];  // not set: most of it is never used
    std::size_t count = 0;
};

struct Device {
    std::int32_t type = 0, index = 0;

    bool operator==(const Device&) const = default;
    bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
    bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }

    friend std::ostream& operator<<(std::ostream& out, const Device& device) {
        if (device.is_cpu()) return out << "cpu";
        if (device.is_cuda()) return out << "cuda:" << device.index;
        if (device.type == aoti_torch_device_type_meta()) return out << "meta";
        return out << "device " << device.index << " of type " << device.type;
    }
};

// torch's number for a dtype.
struct DtypeCode {
    std::int32_t code = 0;

    bool operator==(const DtypeCode&) const = default;
    friend std::ostream& operator<<(std::ostream& out, DtypeCode dtype) {
        const StableIValue code = torch::stable::detail::from(dtype.code);
        return out << torch::headeronly::toString(torch::stable::detail::to<torch::headeronly::ScalarType>(code));
    }
};

namespace dtypes {
inline const DtypeCode float64{aoti_torch_dtype_float64()}, float32{aoti_torch_dtype_float32()},
    float16{aoti_torch_dtype_float16()}, bfloat16{aoti_torch_dtype_bfloat16()}, int64{aoti_torch_dtype_int64()},
    int32{aoti_torch_dtype_int32()}, int16{aoti_torch_dtype_int16()}, int8{aoti_torch_dtype_int8()},
    uint8{aoti_torch_dtype_uint8()}, boolean{aoti_torch_dtype_bool()};
}  // namespace dtypes

// Owns a reference to one of torch's tensors. What is asked of torch is asked once.
class Tensor {
public:
    Tensor() = default;  // absent

    explicit Tensor(AtenTensorHandle owned) : handle(owned) {
        std::int64_t *sizes = nullptr, *strides = nullptr, dims = 0;
        const bool read = aoti_torch_get_dim(handle, &dims) == AOTI_TORCH_SUCCESS &&
                          aoti_torch_get_sizes(handle, &sizes) == AOTI_TORCH_SUCCESS &&
                          aoti_torch_get_strides(handle, &strides) == AOTI_TORCH_SUCCESS &&
                          aoti_torch_get_dtype(handle, &type.code) == AOTI_TORCH_SUCCESS &&
                          aoti_torch_get_device_type(handle, &place.type) == AOTI_TORCH_SUCCESS &&
                          aoti_torch_get_device_index(handle, &place.index) == AOTI_TORCH_SUCCESS;
        if (!read) {
            reset();
            check_torch(AOTI_TORCH_FAILURE, "describe a tensor");
        }
        extents = {sizes, static_cast<std::size_t>(dims)};
        steps = {strides, static_cast<std::size_t>(dims)};
    }

    Tensor(Tensor&& other) noexcept { *this = std::move(other); }
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle, other.handle);
        type = other.type;
        place = other.place;
        extents = other.extents;
        steps = other.steps;
        return *this;
    }
    ~Tensor() { reset(); }

    bool defined() const { return handle != nullptr; }
    AtenTensorHandle get() const { return handle; }
    AtenTensorHandle release() { return std::exchange(handle, nullptr); }

    DtypeCode dtype() const { return type; }
    Device device() const { return place; }
    bool is_cpu() const { return place.is_cpu(); }
    std::int64_t dim() const { return static_cast<std::int64_t>(extents.size()); }
    Sizes sizes() const { return extents; }
    std::int64_t size(std::int64_t d) const { return extents[d]; }
    std::int64_t stride(std::int64_t d) const { return steps[d]; }

    std::int64_t numel() const {
        std::int64_t product = 1;
        for (const std::int64_t size : extents) product *= size;
        return product;
    }

    bool is_contiguous() const {
        std::int64_t expected = 1;
        for (std::int64_t d = dim() - 1; d >= 0; --d) {
            if (size(d) == 0) return true;
            if (size(d) != 1 && stride(d) != expected) return false;
            expected *= size(d);
        }
        return true;
    }

    bool is_floating() const {
        return type == dtypes::float32 || type == dtypes::bfloat16 || type == dtypes::float16 ||
               type == dtypes::float64;
    }

    const void* const_data_ptr() const {
        const void* pointer = nullptr;
        check_torch(torch_get_const_data_ptr(handle, &pointer), "give a tensor's memory");
        return pointer;
    }

    void* mutable_data_ptr() const {
        void* pointer = nullptr;
        check_torch(torch_get_mutable_data_ptr(handle, &pointer), "give a tensor's memory");
        return pointer;
    }

private:
    void reset() {
        if (handle) aoti_torch_delete_tensor_object(std::exchange(handle, nullptr));
    }

    AtenTensorHandle handle = nullptr;
    DtypeCode type;
    Device place;
    Sizes extents, steps;
};

using OptionalTensor = std::optional<Tensor>;

// Contiguous, with memory that holds anything.
inline Tensor empty(Sizes sizes, DtypeCode dtype, Device device) {
    Shape strides;
    for (std::size_t d = 0; d < sizes.size(); ++d) strides.push_back(1);
    for (std::size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<std::int64_t>(sizes[d], 1);
    AtenTensorHandle handle = nullptr;
    check_torch(aoti_torch_empty_strided(static_cast<std::int64_t>(sizes.size()), sizes.data(), Sizes(strides).data(),
                                         dtype.code, device.type, device.index, &handle),
                "allocate memory");
    return Tensor(handle);
}

// ---- Rare operations, for which torch has no C function: through its dispatcher ----
namespace detail {

template <class... Rest>
Tensor call_torch(const char* name, const char* overload, const Tensor& self, Rest... rest) {
    AtenTensorHandle argument = nullptr;
    check_torch(aoti_torch_new_tensor_handle(self.get(), &argument), "share a tensor");
    StableIValue stack[] = {torch::stable::detail::from(argument), torch::stable::detail::from(rest)...};
    check_torch(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION), name);
    return Tensor(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
}

}  // namespace detail

inline Tensor contiguous(const Tensor& t) {
    return detail::call_torch("aten::contiguous", "", t, aoti_torch_memory_format_contiguous_format());
}

// Makes `t` one of that dtype.
inline void convert(Tensor& t, DtypeCode dtype) {
    if (t.dtype() != dtype)
        t = detail::call_torch("aten::to", "dtype", t, dtype.code, /*non_blocking=*/false, /*copy=*/false,
                               std::nullopt);
}

inline void copy_into(const Tensor& to, const Tensor& from) {
    check_torch(aoti_torch_copy_(to.get(), from.get(), /*non_blocking=*/0), "copy a tensor");
}

// In the layout of `t`, without gaps.
inline Tensor empty_like(const Tensor& t) {
    if (t.is_contiguous()) return empty(t.sizes(), t.dtype(), t.device());
    const auto none = std::nullopt;
    return detail::call_torch("aten::empty_like", "", t, none, none, none, none, none);
}

// ---- What both families of operators ask ----

inline std::optional<ElementType> element_type(const Tensor& t) {
    const std::pair<DtypeCode, ElementType> all[] = {
        {dtypes::float32, ElementType::kFloat32},   {dtypes::int64, ElementType::kInt64},
        {dtypes::bfloat16, ElementType::kBFloat16}, {dtypes::float16, ElementType::kFloat16},
        {dtypes::float64, ElementType::kFloat64},   {dtypes::int32, ElementType::kInt32},
        {dtypes::int16, ElementType::kInt16},       {dtypes::int8, ElementType::kInt8},
        {dtypes::uint8, ElementType::kUInt8},       {dtypes::boolean, ElementType::kUInt8}};
    for (const auto& [code, type] : all)
        if (t.dtype() == code) return type;
    return std::nullopt;
}

// Of a tensor on the CPU that holds one.
inline double number_in(const Tensor& t) {
    const Elements number{t.const_data_ptr(), *element_type(t), {}};
    return read_element<double>(number, 0);
}

inline bool holds_class_indices(const Tensor& t) {
    const DtypeCode dtype = t.dtype();
    return dtype == dtypes::int64 || dtype == dtypes::int32 || dtype == dtypes::int16 || dtype == dtypes::uint8;
}

inline void check_floating(const char* name, const Tensor& t) {
    check(t.is_floating(), name, " must be float64, float32, float16 or bfloat16, got ", t.dtype());
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& input) {
    check(t.device() == input.device(), name, " must be on the device of the input (", input.device(), "), got ",
          t.device());
}

// Of a loss with these rows, for one number or for all of them.
inline void check_upstream(const Tensor& grad_loss, const Tensor& input, Sizes rows) {
    check_same_device("grad_loss", grad_loss, input);
    check(grad_loss.numel() == 1 || grad_loss.sizes() == rows,
          "grad_loss must be one number or have the shape of the loss, ", rows, ", got ", grad_loss.sizes());
}

// The type of arithmetic, losses and statistics: float64 for float64, else float32.
inline DtypeCode acc_of(const Tensor& t) { return t.dtype() == dtypes::float64 ? t.dtype() : dtypes::float32; }

inline std::int64_t class_dim_of(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

}  // namespace fused_losses
