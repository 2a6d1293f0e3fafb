// Cache-line aligned scratch memory. Not std::vector: its out-of-line members, compiled for AVX-512, could be the copy
// the linker keeps for everybody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class T>
class Scratch {
public:
    explicit Scratch(std::int64_t size)
        : pointer(size == 0 ? nullptr : static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(pointer, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    T* data() const { return pointer; }

private:
    T* pointer;
};

}  // namespace FL_ISA
}  // namespace fused_losses
