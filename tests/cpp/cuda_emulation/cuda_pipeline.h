// Stands in for the CUDA toolkit's header of this name. A copy that a thread has begun is done at once or when the
// thread waits for it, by chance: whoever reads too early, or what is overwritten too early, shows.
#pragma once

#include "races.h"
#include "scheduler.h"

namespace cuda_emulation {

inline void do_copies(Thread& thread) {
    for (const Copy& copy : thread.copies) {
        note_access(copy.to, copy.bytes.size(), true);
        std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    }
    thread.copies.clear();
}

}  // namespace cuda_emulation

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t size) {
    using namespace cuda_emulation;
    const auto aligned = [&](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % size == 0; };
    if ((size != 4 && size != 8 && size != 16) || !aligned(to) || !aligned(from))
        die("__pipeline_memcpy_async: not 4, 8 or 16 bytes, or not aligned to them");
    const auto* const bytes = static_cast<const unsigned char*>(from);
    note_access(to, size, true);
    current->copies.push_back({to, {bytes, bytes + size}});
    if (one_in(2)) do_copies(*current);
}

inline void __pipeline_commit() {}

inline void __pipeline_wait_prior(std::size_t prior) {
    if (prior != 0) cuda_emulation::die("__pipeline_wait_prior: only 0 is emulated");
    cuda_emulation::do_copies(*cuda_emulation::current);
}
