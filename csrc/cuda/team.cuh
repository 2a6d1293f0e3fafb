// The threads that share a row. Every kind of team offers
//
//     walk<kBytes>(row, count, vectors, body, from)   as walk_vectors(): each class of [0, count) is one thread's
//     reduce(numbers, combine)                        over all threads, in an order that depends on the team's size
//                                                     alone; all of them get the result
//     records()                                       whether this thread writes what there is one of per row
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

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
    static constexpr bool is_column = true;
    static constexpr int part = 0, parts = 1;

    FL_DEVICE explicit Alone(const Residence& = {}) {}

    template <int kBytes = 16, class Stored, class Body>
    FL_DEVICE void walk(const Stored*, int count, bool, Body body, const Stored* = nullptr) const {
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
    static constexpr bool is_column = true;
    int pixels, pixel, part, parts;

    FL_DEVICE explicit Column(int count)
        : pixels(count), pixel(threadIdx.x % count), part(threadIdx.x / count), parts(kBlock / count) {}

    template <int kBytes = 16, class Stored, class Body>
    FL_DEVICE void walk(const Stored*, int count, bool, Body body, const Stored* = nullptr) const {
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

// Some lanes of a warp, a warp, a block, or all blocks of a cluster. Decided at run time: a third of the kernels to
// compile.
struct Group {
    static constexpr bool is_column = false;
    const int threads, lane;  // in this block
    int turn = 0;

    FL_DEVICE explicit Group(const Residence& plan) : threads(plan.threads), lane(threadIdx.x % plan.threads) {}

    template <int kBytes = 16, class Stored, class Body>
    FL_DEVICE void walk(const Stored* row, int count, bool vectors, Body body, const Stored* from = nullptr) const {
        walk_vectors<kBytes>(row, count, vectors, lane, threads, body, from);
    }

    // Of all groups of the grid, and this one among them. Only blocks form clusters.
    FL_DEVICE std::int64_t count() const { return std::int64_t(gridDim.x / cluster_size()) * (kBlock / threads); }
    FL_DEVICE std::int64_t number() const {
        return std::int64_t(blockIdx.x / cluster_size()) * (kBlock / threads) + threadIdx.x / threads;
    }

    // Of the first group in this warp.
    FL_DEVICE std::int64_t first_in_warp() const {
        return threads < 32 ? number() - threadIdx.x % 32 / threads : number();
    }

    FL_DEVICE bool records() const { return lane == 0 && cluster_rank() == 0; }

    // What the group's threads in this block have written to shared memory is there for all of them.
    FL_DEVICE void sync() const { threads == kBlock ? __syncthreads() : __syncwarp(); }

    template <class A, int n, class Combine>
    FL_DEVICE void reduce(Numbers<A, n>& x, Combine combine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const A other = __shfl_xor_sync(0xffffffffu, x.v[i], distance);
                // Both lanes of a pair must combine in the same order.
                x.v[i] = (threadIdx.x & distance) ? combine(other, x.v[i]) : combine(x.v[i], other);
            }
        }
        if (threads < kBlock) return;
        constexpr int warps = kBlock / 32;
        __shared__ Numbers<A, n> of_warp[2][warps];
        turn ^= 1;  // who is late reads one half while others write to the other
        if (threadIdx.x % 32 == 0) of_warp[turn][threadIdx.x / 32] = x;
        __syncthreads();
        x = of_warp[turn][0];
        for (int i = 1; i < warps; ++i) x.take(of_warp[turn][i], combine);
        combine_over_cluster(x, turn,
                             [&](Numbers<A, n>& mine, const Numbers<A, n>& other) { mine.take(other, combine); });
    }

    // For all threads, at the end: nobody may read the shared memory of a block that has finished.
    FL_DEVICE void part_company() const {
        if (cluster_size() > 1) sync_cluster();
    }
};

}  // namespace fused_losses::cuda
