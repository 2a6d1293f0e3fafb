// The threads that share a row. Every kind of team offers
//
//     walk(row, count, vectors, body)   body(Count<n>, c) so that each class of [0, count) is one thread's
//     reduce(numbers, combine)          over all threads, in an order that depends on the team's size alone; all get it
//     records()                         whether this thread is the one that writes what there is one of per row
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

// The lanes that share a row with this one.
template <int kWidth>
FL_DEVICE unsigned lanes_of_group() {
    if constexpr (kWidth == 32) return 0xffffffffu;
    return ((1u << kWidth % 32) - 1) << (threadIdx.x % 32 / kWidth * kWidth);
}

struct Plus {
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return a + b;
    }
};

struct Larger {
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return b > a ? b : a;
    }
};

// Numbers that are combined one by one.
template <class A, int n>
struct Numbers {
    A v[n];

    template <class Combine>
    FL_DEVICE void take(const Numbers& other, Combine combine) {
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = combine(v[i], other.v[i]);
    }
};

// A thread that has its row for itself.
struct Alone {
    static constexpr int part = 0, parts = 1;

    template <class Stored, class Body>
    FL_DEVICE void walk(const Stored*, int count, bool, Body body) const {
        for (int c = 0; c < count; ++c) body(Count<1>{}, c);
    }
    template <class T, class Combine>
    FL_DEVICE void reduce(T&, Combine) const {}

    FL_DEVICE bool records() const { return true; }
    FL_DEVICE std::int64_t count() const { return std::int64_t(gridDim.x) * kBlock; }
    FL_DEVICE std::int64_t number() const { return std::int64_t(blockIdx.x) * kBlock + threadIdx.x; }
};

// Threads of a block that are `pixels` apart share a pixel; neighbours have neighbouring pixels.
struct Column {
    int pixels, pixel, part, parts;

    FL_DEVICE explicit Column(int count)
        : pixels(count), pixel(threadIdx.x % count), part(threadIdx.x / count), parts(kBlock / count) {}

    template <class Stored, class Body>
    FL_DEVICE void walk(const Stored*, int count, bool, Body body) const {
        for (int c = part; c < count; c += parts) body(Count<1>{}, c);
    }

    // For all threads of the block: merge(T& mine, const T& other).
    template <class T, class Merge>
    FL_DEVICE void merge_parts(T& x, Merge merge) const {
        if (parts == 1) return;
        __shared__ T of_thread[kBlock];
        __syncthreads();  // the previous result has been read
        of_thread[threadIdx.x] = x;
        __syncthreads();
        x = of_thread[pixel];
        for (int i = 1; i < parts; ++i) merge(x, of_thread[pixel + i * pixels]);
    }

    template <class A, int n, class Combine>
    FL_DEVICE void reduce(Numbers<A, n>& x, Combine combine) const {
        merge_parts(x, [&](Numbers<A, n>& mine, const Numbers<A, n>& other) { mine.take(other, combine); });
    }

    FL_DEVICE bool records() const { return part == 0; }
};

// Some lanes of a warp, a warp or a block; or all blocks of a cluster.
template <int kThreads>
struct Group {
    int lane = threadIdx.x % kThreads;
    int turn = 0;

    template <class Stored, class Body>
    FL_DEVICE void walk(const Stored* row, int count, bool vectors, Body body) const {
        walk_classes<kThreads>(row, count, vectors, lane, body);
    }

    FL_DEVICE static constexpr bool may_be_cluster() { return kThreads == kBlock; }

    // Of all groups of the grid, and this one among them.
    FL_DEVICE std::int64_t count() const {
        return may_be_cluster() ? std::int64_t(gridDim.x) / cluster_size() : std::int64_t(gridDim.x) * (kBlock / kThreads);
    }
    FL_DEVICE std::int64_t number() const {
        if (may_be_cluster()) return blockIdx.x / cluster_size();
        return std::int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
    }

    FL_DEVICE bool records() const { return lane == 0 && (!may_be_cluster() || cluster_rank() == 0); }

    // What the group's threads in this block have written to shared memory is there for all of them.
    FL_DEVICE void sync() const {
        if constexpr (kThreads > 32)
            __syncthreads();
        else
            __syncwarp(lanes_of_group<kThreads>());
    }

    template <class A, int n, class Combine>
    FL_DEVICE void reduce(Numbers<A, n>& x, Combine combine) {
        static_assert(kThreads >= 32);
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const A other = __shfl_xor_sync(0xffffffffu, x.v[i], distance);
                // Both lanes of a pair must combine in the same order.
                x.v[i] = (threadIdx.x & distance) ? combine(other, x.v[i]) : combine(x.v[i], other);
            }
        }
        if constexpr (kThreads > 32) {
            constexpr int warps = kThreads / 32;
            __shared__ Numbers<A, n> of_warp[2][warps];
            turn ^= 1;  // who is late reads one half while others write to the other
            if (threadIdx.x % 32 == 0) of_warp[turn][threadIdx.x / 32] = x;
            __syncthreads();
            x = of_warp[turn][0];
            for (int i = 1; i < warps; ++i) x.take(of_warp[turn][i], combine);
            combine_over_cluster(x, turn, [&](Numbers<A, n>& mine, const Numbers<A, n>& other) {
                mine.take(other, combine);
            });
        }
    }

    // For all threads, at the end: nobody may read the shared memory of a block that has finished.
    FL_DEVICE void part_company() const {
        if (may_be_cluster() && cluster_size() > 1) sync_cluster();
    }
};

template <int kThreads>
using TeamOf = std::conditional_t<kThreads == 1, Alone, Group<kThreads>>;

}  // namespace fused_losses::cuda
