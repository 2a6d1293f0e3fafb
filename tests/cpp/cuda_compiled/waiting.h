// Instructions of compiled kernels by which threads and blocks wait for each other.
#pragma once

#include "cuda_compiled/memory.h"

// ---- Warps ---------------------------------------------------------------------------------------------------------

enum class Shuffle { down, bfly, idx };

// limits: in its low bits the last lane that may be read, or that of a segment; above them the bits that name a
// segment.
template <Shuffle kind>
u32 shuffle(u32 mine, u32 by, u32 limits, u32 mask, bool& is_inside,
            cuda_emulation::Location where = cuda_emulation::Location::current()) {
    const int lane = cuda_emulation::lane(), segment = limits >> 8 & 31, distance = by & 31;
    const int first = lane & segment, last = first | (limits & 31 & ~segment);
    const int from = kind == Shuffle::down   ? lane + distance
                     : kind == Shuffle::bfly ? lane ^ distance
                                             : first | (distance & ~segment);
    is_inside = from <= last;
    return cuda_emulation::shuffle("shfl.sync", mask, mine, is_inside ? from : lane, where);
}

// ---- Clusters ------------------------------------------------------------------------------------------------------

inline u32 address_in_block(u32 at, u32 rank) {
    if (rank >= cuda_emulation::cluster_size) cuda_emulation::die("mapa: no such block in the cluster");
    return at | (rank + 1) << 24;
}

namespace cuda_emulation {

// An mbarrier: what its phase waits for.
struct CountingBarrier {
    u16 expected, pending;  // arrivals
    s32 bytes : 31;         // still to come; may come before they are announced
    u32 phase : 1;

    void settle() {
        if (pending != 0 || bytes != 0) return;
        pending = expected;
        phase ^= 1;
    }
};
static_assert(sizeof(CountingBarrier) == 8);

inline CountingBarrier& barrier_at(unsigned char* place) { return *reinterpret_cast<CountingBarrier*>(place); }

// A number on its way to another block.
struct Sent {
    u32 to, value, barrier;
    unsigned cluster;
};
inline std::vector<Sent> sent;

inline unsigned char* in_cluster(u32 at) {
    const u32 rank = at >> 24, offset = at & 0xffffff;
    if (rank == 0) bad_address("cluster", at);
    return static_cast<unsigned char*>(of_block(compiled_shared + offset, rank - 1));
}

inline void arrives(const Sent& number) {
    std::memcpy(in_cluster(number.to), &number.value, sizeof number.value);
    CountingBarrier& barrier = barrier_at(in_cluster(number.barrier));
    barrier.bytes -= sizeof number.value;
    barrier.settle();
}

// Some of the numbers that this cluster's blocks have sent, in any order.
inline void deliver(bool all) {
    const unsigned cluster = current_block->index.x / cluster_size;
    for (std::size_t i = sent.size(); i-- > 0;) {
        if (sent[i].cluster != cluster || (!all && one_in(2))) continue;
        const Sent number = sent[i];
        sent.erase(sent.begin() + std::ptrdiff_t(i));
        arrives(number);
    }
}

}  // namespace cuda_emulation

inline void init(u64 at, u32 count) {
    cuda_emulation::barrier_at(shared_place(at, 8)) = {u16(count), u16(count), 0, 0};
}
inline void arrive(u64 at, u32 bytes) {
    cuda_emulation::CountingBarrier& barrier = cuda_emulation::barrier_at(shared_place(at, 8));
    if (barrier.pending == 0) cuda_emulation::die("mbarrier: more arrivals than it was made for");
    barrier.bytes += s32(bytes);
    --barrier.pending;
    barrier.settle();
    cuda_emulation::maybe_yield();
}
// Whether the phase has ended that has this parity.
inline bool try_wait(u64 at, u32 parity) {
    cuda_emulation::deliver(/*all=*/false);
    if (cuda_emulation::barrier_at(shared_place(at, 8)).phase != parity) return true;
    cuda_emulation::nap();
    return false;
}
inline void store_async(u64 to, u32 value, u64 barrier) {
    if (u32(to) >> 24 != u32(barrier) >> 24) cuda_emulation::die("st.async: the barrier is another block's");
    cuda_emulation::sent.push_back({u32(to), value, u32(barrier), blockIdx.x / cuda_emulation::cluster_size});
    if (cuda_emulation::one_in(2)) cuda_emulation::deliver(/*all=*/true);
    cuda_emulation::maybe_yield();
}
inline void wait_for_cluster(cuda_emulation::Location where = cuda_emulation::Location::current()) {
    cuda_emulation::deliver(/*all=*/true);
    cuda_emulation::wait_for_cluster("barrier.cluster", where);
}

inline void wait_for_launch_before() {
    cuda_emulation::current->has_waited = cuda_emulation::current_block->has_waited = true;
}

// ---- Assertions ----------------------------------------------------------------------------------------------------

extern "C" [[noreturn]] void __assert_fail(const char* assertion, const char* file, unsigned line,
                                           const char* function) noexcept;

inline void assertion_failed(const unsigned char* message, const unsigned char* file, const unsigned char* line,
                             const unsigned char*, const unsigned char*) {
    const auto text = [](const unsigned char* pointer) {
        const char* found;
        std::memcpy(&found, pointer, sizeof found);
        return found;
    };
    unsigned number;
    std::memcpy(&number, line, sizeof number);
    __assert_fail(text(message), text(file), number, "");
}
