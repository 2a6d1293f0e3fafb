// Tensors of any type, whose elements are read one by one.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/numeric.h"
#include "core/row_problem.h"

namespace fused_losses {

enum class ElementType : std::uint8_t {
    kFloat64,
    kFloat32,
    kFloat16,
    kBFloat16,
    kInt64,
    kInt32,
    kInt16,
    kInt8,
    kUInt8,  // bool, too
};

FL_HD Dtype dtype_of(ElementType type) {
    switch (type) {
        case ElementType::kFloat64: return Dtype::kFloat64;
        case ElementType::kFloat16: return Dtype::kFloat16;
        case ElementType::kBFloat16: return Dtype::kBFloat16;
        default: return Dtype::kFloat32;
    }
}

inline IndexType index_type_of(ElementType type) {
    switch (type) {
        case ElementType::kInt32: return IndexType::kInt32;
        case ElementType::kInt16: return IndexType::kInt16;
        case ElementType::kUInt8: return IndexType::kUInt8;
        default: return IndexType::kInt64;
    }
}

// A tensor reached by two strides; a null pointer means "absent".
struct Elements {
    const void* data = nullptr;
    ElementType type = ElementType::kFloat32;
    RowStride stride;
};

inline namespace FL_ISA {

// Calls body.operator()<Stored>() for the type of a tensor.
template <class Body>
FL_HD auto visit_type(ElementType type, Body body) {
    switch (type) {
        case ElementType::kFloat64: return body.template operator()<double>();
        case ElementType::kFloat32: return body.template operator()<float>();
        case ElementType::kFloat16: return body.template operator()<Half>();
        case ElementType::kBFloat16: return body.template operator()<BFloat16>();
        case ElementType::kInt64: return body.template operator()<std::int64_t>();
        case ElementType::kInt32: return body.template operator()<std::int32_t>();
        case ElementType::kInt16: return body.template operator()<std::int16_t>();
        case ElementType::kInt8: return body.template operator()<std::int8_t>();
        case ElementType::kUInt8: return body.template operator()<std::uint8_t>();
    }
    return decltype(body.template operator()<float>())();
}

template <class T, class Stored>
FL_HD T as_number(Stored x) {
    if constexpr (std::is_class_v<Stored>)
        return static_cast<T>(widen(x));
    else
        return static_cast<T>(x);
}

// The tensors are small beside the logits, so their types are looked up per element instead of compiling a kernel for
// every combination; the branch is the same for all rows.
template <class T>
FL_HD T read_element(const Elements& e, std::int64_t offset) {
    return visit_type(e.type, [&]<class Stored>() { return as_number<T>(static_cast<const Stored*>(e.data)[offset]); });
}

}  // namespace FL_ISA
}  // namespace fused_losses
