// A column of numbers as the Z-Error kernels read them, for tests.
#pragma once

#include <vector>

#include "core/numeric.h"
#include "z_error/problem.h"

namespace fused_losses_test {

using namespace fused_losses;

// Numbers of one of the types, reached by strides; the memory ends with the last of them.
struct Column {
    Elements elements;
    std::vector<unsigned char> bytes;

    Column(ElementType type, RowStride stride, std::int64_t size) : bytes(std::size_t(size * width_of(type))) {
        elements = {bytes.data(), type, stride};
    }

    static int width_of(ElementType type) {
        static const int widths[] = {8, 4, 2, 2, 8, 4, 2, 1, 1};
        return widths[int(type)];
    }

    template <class Body>
    void visit(std::int64_t at, Body body) {
        void* const p = bytes.data() + at * width_of(elements.type);
        switch (elements.type) {
            case ElementType::kFloat64: return body(*static_cast<double*>(p));
            case ElementType::kFloat32: return body(*static_cast<float*>(p));
            case ElementType::kFloat16: return body(*static_cast<Half*>(p));
            case ElementType::kBFloat16: return body(*static_cast<BFloat16*>(p));
            case ElementType::kInt64: return body(*static_cast<std::int64_t*>(p));
            case ElementType::kInt32: return body(*static_cast<std::int32_t*>(p));
            case ElementType::kInt16: return body(*static_cast<std::int16_t*>(p));
            case ElementType::kInt8: return body(*static_cast<std::int8_t*>(p));
            case ElementType::kUInt8: return body(*static_cast<std::uint8_t*>(p));
        }
    }
    void set(std::int64_t at, double x) {
        visit(at, [&]<class T>(T& element) {
            if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
                element = narrow<T>(float(x));
            else
                element = T(x);
        });
    }
    double get(std::int64_t at) {
        double x = 0;
        visit(at, [&]<class T>(T& element) {
            if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
                x = widen(element);
            else
                x = double(element);
        });
        return x;
    }
};

}  // namespace fused_losses_test
