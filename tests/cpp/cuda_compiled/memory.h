// Loads and stores of compiled kernels. Each must be aligned, and within what it says it reaches.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_pipeline.h"
#include "cuda_runtime_api.h"

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

namespace cuda_emulation {

inline constexpr std::size_t kStaticShared = 32 * 1024,
                             kSharedSize = kStaticShared + fused_losses::cuda::kMostDynamicShared;
// A kernel's shared memory, of which registers hold offsets. In the upper byte of those that other blocks of the
// cluster may use is the block's rank, plus one.
extern thread_local unsigned char compiled_shared[kSharedSize];

inline int line = 0;  // of the PTX that runs
[[noreturn]] void bad_address(const char* memory, u64 at);

// ---- Device memory, as other blocks see it (device_memory.cpp) ----------------------------------------------------

// A store is seen by other blocks after a fence by the thread, or by one that has met it at a barrier since; earlier
// only by chance. A load gives what an earlier load of the block found, by chance, unless it bypasses the cache or a
// thread of the block has passed a fence since.
void load_from_device(u64 at, std::size_t size, bool bypasses, unsigned char* to);
void store_to_device(u64 at, std::size_t size, const unsigned char* from);
void publish(u64 at, std::size_t size);  // for an atomic function
void device_fence();

}  // namespace cuda_emulation

using cuda_emulation::kSharedSize;
using fused_losses::cuda::kMostDynamicShared;

#define AT(number) cuda_emulation::line = number;

template <class T, int n>
struct Values {
    T of[n];

    T operator[](int i) const { return of[i]; }
};

inline bool is_shared(u64 at) { return at - reinterpret_cast<u64>(cuda_emulation::compiled_shared) < kSharedSize; }
inline u64 generic_of_address(u64 at) { return reinterpret_cast<u64>(cuda_emulation::compiled_shared) + u32(at); }
inline u64 shared_of_address(u64 at) {
    if (!is_shared(at)) cuda_emulation::bad_address("shared", at);
    return at - reinterpret_cast<u64>(cuda_emulation::compiled_shared);
}

inline unsigned char* shared_place(u64 at, std::size_t size) {
    at = u32(at);
    if (at % size != 0 || at == 0 || at + size > kSharedSize) cuda_emulation::bad_address("shared", at);
    return cuda_emulation::compiled_shared + at;
}
inline void check_global(u64 at, std::size_t size) {
    constexpr u64 first_page = 4096;
    if (at % size != 0 || at < first_page || is_shared(at)) cuda_emulation::bad_address("global", at);
}

enum Load { kUsual, kBypass };

template <class T, int n>
Values<T, n> load_global(u64 at, Load how) {
    Values<T, n> found;
    check_global(at, sizeof found);
    cuda_emulation::load_from_device(at, sizeof found, how == kBypass, reinterpret_cast<unsigned char*>(&found));
    return found;
}
template <class T, int n>
void store_global(u64 at, const Values<T, n>& values) {
    check_global(at, sizeof values);
    if (cuda_emulation::overlaps && !cuda_emulation::current->has_waited)
        cuda_emulation::die("a thread stores before it has waited for the launch before");
    cuda_emulation::store_to_device(at, sizeof values, reinterpret_cast<const unsigned char*>(&values));
}
inline u32* atomic_place(u64 at) {
    check_global(at, sizeof(u32));
    cuda_emulation::publish(at, sizeof(u32));
    return reinterpret_cast<u32*>(at);
}

template <class T, int n>
Values<T, n> load_shared(u64 at) {
    Values<T, n> found;
    const unsigned char* const place = shared_place(at, sizeof found);
    cuda_emulation::note_access(place, sizeof found, false);
    std::memcpy(&found, place, sizeof found);
    return found;
}
template <class T, int n>
void store_shared(u64 at, const Values<T, n>& values) {
    unsigned char* const place = shared_place(at, sizeof values);
    cuda_emulation::note_access(place, sizeof values, true);
    std::memcpy(place, &values, sizeof values);
}

// Of a thread's own: parameters, too.
template <class T, int n>
Values<T, n> load_local(u64 at) {
    Values<T, n> found;
    std::memcpy(&found, reinterpret_cast<const void*>(at), sizeof found);
    return found;
}
template <class T, int n>
void store_local(u64 at, const Values<T, n>& values) {
    std::memcpy(reinterpret_cast<void*>(at), &values, sizeof values);
}
template <class T, int n>
Values<T, n> load_generic(u64 at) {
    return is_shared(at) ? load_shared<T, n>(shared_of_address(at)) : load_local<T, n>(at);
}
template <class T, int n>
void store_generic(u64 at, const Values<T, n>& values) {
    is_shared(at) ? store_shared<T, n>(shared_of_address(at), values) : store_local<T, n>(at, values);
}

template <std::size_t size>
void copy_async(u64 to, u64 from) {
    alignas(16) unsigned char bytes[size];
    check_global(from, size);
    cuda_emulation::load_from_device(from, size, true, bytes);
    __pipeline_memcpy_async(shared_place(to, size), bytes, size);
}
