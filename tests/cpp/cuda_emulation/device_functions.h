// Functions and types of device code, on top of scheduler.h. No more than kernels and tests need.
#pragma once

#include <algorithm>

#include "clusters.h"
#include "races.h"
#include "scheduler.h"

using std::max, std::min;

// ---- Vectors: aligned as on the device, so that the sanitizers see accesses that are not ----------------------------

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// ---- Barriers, fences and clusters ---------------------------------------------------------------------------------

namespace cuda_emulation {

template <class T>
std::uint64_t to_bits(const T& x) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

}  // namespace cuda_emulation

#define FL_WHERE cuda_emulation::Location where = cuda_emulation::Location::current()

inline void __syncthreads(FL_WHERE) { cuda_emulation::wait_for_block("__syncthreads", where); }
// Whether any thread of the block brings something other than 0.
inline int __syncthreads_or(int mine, FL_WHERE) {
    int& any = cuda_emulation::current_block->any;
    if (mine != 0) any = 1;
    cuda_emulation::wait_for_block("__syncthreads_or", where);
    const int found = cuda_emulation::current_block->any;
    cuda_emulation::wait_for_block("__syncthreads_or", where);
    cuda_emulation::current_block->any = 0;
    cuda_emulation::wait_for_block("__syncthreads_or", where);
    return found;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FL_WHERE) {
    cuda_emulation::exchange("__syncwarp", mask, 0, where, /*is_barrier=*/true);
}
inline void __threadfence() {}

inline unsigned __clusterSizeInBlocks() { return cuda_emulation::cluster_size; }
inline unsigned __clusterRelativeBlockRank() { return blockIdx.x % cuda_emulation::cluster_size; }
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait(FL_WHERE) { cuda_emulation::wait_for_cluster("__cluster_barrier_wait", where); }
// To be used before the thread gives way: until then the blocks stay where they are.
inline void* __cluster_map_shared_rank(const void* mine, unsigned rank) {
    return cuda_emulation::of_block(const_cast<void*>(mine), rank);
}

inline void __nanosleep(unsigned) { cuda_emulation::nap(); }

// ---- Warps ---------------------------------------------------------------------------------------------------------

namespace cuda_emulation {

// Reading from a lane that does not take part is undefined on the device.
template <class T>
T shuffle(const char* function, unsigned mask, T mine, int source, const Location& where) {
    if (!(mask >> source & 1)) die(std::string(function) + ": reads from a lane that is not in the mask");
    return from_bits<T>(exchange(function, mask, to_bits(mine), where)[source]);
}

inline int segment_begin(int width) { return lane() / width * width; }

}  // namespace cuda_emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, FL_WHERE) {
    const int begin = cuda_emulation::segment_begin(width);
    return cuda_emulation::shuffle("__shfl_sync", mask, x, begin + (source & (width - 1)), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = 32, FL_WHERE) {
    const int lane = cuda_emulation::lane(), end = cuda_emulation::segment_begin(width) + width;
    const int source = lane + int(distance) < end ? lane + int(distance) : lane;
    return cuda_emulation::shuffle("__shfl_down_sync", mask, x, source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = 32, FL_WHERE) {
    const int lane = cuda_emulation::lane(), end = cuda_emulation::segment_begin(width) + width;
    const int source = (lane ^ lane_mask) < end ? lane ^ lane_mask : lane;
    return cuda_emulation::shuffle("__shfl_xor_sync", mask, x, source, where);
}

#undef FL_WHERE

// ---- Memory --------------------------------------------------------------------------------------------------------

template <class T>
T __ldcg(const T* from) {
    return *from;
}

namespace cuda_emulation {

// Others may come in between what this thread did before and the update, or between that and what it does next.
template <class T, class Update>
T atomic_update(T* address, Update update) {
    maybe_yield();
    in_atomic_function = true;
    const T old = *address;
    *address = update(old);
    in_atomic_function = false;
    maybe_yield();
    return old;
}

}  // namespace cuda_emulation

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return max(old, x); });
}
// Counts to `last`, then starts at zero again.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    return cuda_emulation::atomic_update(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}
