// Memory for the kernels that shows what they must not do: write beside the elements they were given, write to an
// input, or read what nobody wrote.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/row_problem.h"

namespace fused_losses_test {

using fused_losses::RowStride;

// Under the address sanitizer the memory ends with its last element, so that reading on is seen too.
#ifdef __SANITIZE_ADDRESS__
inline constexpr std::size_t kGuard = 0;
#else
inline constexpr std::size_t kGuard = 256;
#endif
inline constexpr int kUnwritten = 0xff;  // a NaN in every format

struct Layout {
    RowStride row;
    std::int64_t cls = 0, outer = 1, inner = 0, classes = 1;
    std::int64_t begin = 0;  // of the first element

    std::int64_t at(std::int64_t o, std::int64_t i, std::int64_t c) const { return begin + row.at(o, i) + c * cls; }
    std::int64_t size() const { return outer * inner * classes == 0 ? 0 : at(outer - 1, inner - 1, classes - 1) + 1; }
};

enum class Kind { kRows, kPaddedRows, kEveryOther, kPixels, kStridedPixels };
inline constexpr int kKinds = 5;

inline Layout layout_of(Kind kind, std::int64_t outer, std::int64_t inner, std::int64_t classes) {
    const auto make = [&](std::int64_t so, std::int64_t si, std::int64_t cls) {
        return Layout{{so, si}, cls, outer, inner, classes, 0};
    };
    switch (kind) {
        case Kind::kRows: return make(inner * classes, classes, 1);
        case Kind::kPaddedRows: return make(inner * (classes + 3), classes + 3, 1);
        case Kind::kEveryOther: return make(inner * (2 * classes + 1), 2 * classes + 1, 2);
        case Kind::kPixels: return make(classes * inner, 1, inner);
        case Kind::kStridedPixels: break;
    }
    return make(classes * (2 * inner + 3) + 5, 2, 2 * inner + 3);
}

// Elements of type T in a layout. They begin at an odd element, so never on a vector boundary.
template <class T>
class Guarded {
public:
    Layout layout;

    explicit Guarded(const Layout& l) : layout(l), bytes(kFront + l.size() * sizeof(T) + kGuard, kUnwritten) {}

    T* data() { return reinterpret_cast<T*>(bytes.data() + kFront); }
    T& at(std::int64_t o, std::int64_t i, std::int64_t c = 0) { return data()[layout.at(o, i, c)]; }
    bool operator==(const Guarded& other) const { return bytes == other.bytes; }

    // Whether nothing but the elements has been written to.
    bool only_elements_written() const {
        Guarded copy = *this;
        for (std::int64_t o = 0; o < layout.outer; ++o)
            for (std::int64_t i = 0; i < layout.inner; ++i)
                for (std::int64_t c = 0; c < layout.classes; ++c)
                    std::memset(static_cast<void*>(&copy.at(o, i, c)), kUnwritten, sizeof(T));
        return copy == Guarded(layout);
    }

private:
    static constexpr std::size_t kFront = 256 + sizeof(T);
    std::vector<unsigned char> bytes;
};

// What uninitialised memory holds from here on. The kernels' scratch comes from the aligned operator new, which
// test_kernels.cpp replaces, their other memory from the stack.
inline int paint_byte = kUnwritten;

[[gnu::noinline]] inline void paint_stack() {
    unsigned char frame[1 << 16];
    std::memset(frame, paint_byte, sizeof frame);
    asm volatile("" : : "r"(frame) : "memory");  // keeps the memset
}

}  // namespace fused_losses_test
