// Functions and types of device code, on top of scheduler.h. Extend it as kernels need more.
#pragma once

#include <algorithm>
#include <bit>

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
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Barriers, fences and clusters
// -------------------------------------------------------------------------------------------

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

inline void __syncthreads(FL_WHERE) { cuda_emulation::wait_for_block("__syncthreads", false, where); }
inline int __syncthreads_count(int predicate, FL_WHERE) {
    return int(cuda_emulation::wait_for_block("__syncthreads_count", predicate != 0, where));
}
inline int __syncthreads_or(int predicate, FL_WHERE) {
    return cuda_emulation::wait_for_block("__syncthreads_or", predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, FL_WHERE) {
    return cuda_emulation::wait_for_block("__syncthreads_and", predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FL_WHERE) {
    cuda_emulation::exchange("__syncwarp", mask, 0, where, /*is_barrier=*/true);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

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

template <class T, class Combine>
T combine_lanes(const char* function, unsigned mask, T mine, Combine combine, const Location& where) {
    const std::uint64_t* const brought = exchange(function, mask, to_bits(mine), where);
    T result{};
    bool first = true;
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        result = first ? from_bits<T>(brought[i]) : combine(result, from_bits<T>(brought[i]));
        first = false;
    }
    return result;
}

inline unsigned lanes_with(const char* function, unsigned mask, std::uint64_t mine, std::uint64_t wanted,
                           const Location& where) {
    const std::uint64_t* const brought = exchange(function, mask, mine, where);
    unsigned lanes = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1 && brought[i] == wanted) lanes |= 1u << i;
    return lanes;
}

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
T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = 32, FL_WHERE) {
    const int lane = cuda_emulation::lane();
    const int source = lane - int(distance) >= cuda_emulation::segment_begin(width) ? lane - int(distance) : lane;
    return cuda_emulation::shuffle("__shfl_up_sync", mask, x, source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lane_mask, int width = 32, FL_WHERE) {
    const int lane = cuda_emulation::lane(), end = cuda_emulation::segment_begin(width) + width;
    const int source = (lane ^ lane_mask) < end ? lane ^ lane_mask : lane;
    return cuda_emulation::shuffle("__shfl_xor_sync", mask, x, source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FL_WHERE) {
    return cuda_emulation::lanes_with("__ballot_sync", mask, predicate != 0, 1, where);
}
inline int __any_sync(unsigned mask, int predicate, FL_WHERE) {
    return cuda_emulation::lanes_with("__any_sync", mask, predicate != 0, 1, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FL_WHERE) {
    return cuda_emulation::lanes_with("__all_sync", mask, predicate != 0, 1, where) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x, FL_WHERE) {
    const std::uint64_t mine = cuda_emulation::to_bits(x);
    return cuda_emulation::lanes_with("__match_any_sync", mask, mine, mine, where);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T x, int* all, FL_WHERE) {
    const std::uint64_t mine = cuda_emulation::to_bits(x);
    *all = cuda_emulation::lanes_with("__match_all_sync", mask, mine, mine, where) == mask;
    return *all ? mask : 0;
}
// A warp may be split in any way: each lane alone.
inline unsigned __activemask() { return 1u << cuda_emulation::lane(); }

template <class T>
T __reduce_add_sync(unsigned mask, T x, FL_WHERE) {
    return cuda_emulation::combine_lanes("__reduce_add_sync", mask, x, [](T a, T b) { return T(a + b); }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T x, FL_WHERE) {
    return cuda_emulation::combine_lanes("__reduce_min_sync", mask, x, [](T a, T b) { return min(a, b); }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T x, FL_WHERE) {
    return cuda_emulation::combine_lanes("__reduce_max_sync", mask, x, [](T a, T b) { return max(a, b); }, where);
}

#undef FL_WHERE

// ---- Memory --------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcg(T* to, std::type_identity_t<T> x) {
    *to = x;
}
template <class T>
void __stcs(T* to, std::type_identity_t<T> x) {
    *to = x;
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
T atomicSub(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return T(old - x); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return min(old, x); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return max(old, x); });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return old & x; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return old | x; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T) { return x; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
    return cuda_emulation::atomic_update(address, [=](T old) { return old == expected ? x : old; });
}
// Counts to `last`, then starts at zero again.
inline unsigned atomicInc(unsigned* address, unsigned last) {
    return cuda_emulation::atomic_update(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}

// ---- Bits ----------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }
