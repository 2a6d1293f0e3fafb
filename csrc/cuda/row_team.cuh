// The threads that share a row. Every kind of team offers
//
//     reduce(x, nothing, combine)   x[i] over all threads, for all of them: in an order that depends on the team's size
//                                   alone, if combine(a, b) is combine(b, a); combine(x, nothing) is x
//     sync()                        what its threads in this block have written to shared memory is there for all
//     leads                         whether this thread writes what there is one of per row
#pragma once

#include <cmath>
#include <limits>

#include "cuda/cluster.cuh"
#include "cuda/register_plan.h"

namespace fused_losses::cuda {

struct Plus {
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return a + b;
    }
};

// NaN loses.
struct Larger {
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return std::fmax(a, b);
    }
};

// A row's threads need their numbers one by one, too.
template <class Team, class A>
FL_DEVICE A largest_of(Team& team, A x) {
    A only[] = {x};
    team.reduce(only, -std::numeric_limits<A>::infinity(), Larger());
    return only[0];
}
template <class Team, class A>
FL_DEVICE A sum_of(Team& team, A x) {
    A only[] = {x};
    team.reduce(only, A(0), Plus());
    return only[0];
}

// x[i] over all lanes of a warp, for all of them.
template <class A, int n, class Combine>
FL_DEVICE void reduce_warp(A (&x)[n], Combine combine) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = combine(x[i], __shfl_xor_sync(0xffffffffu, x[i], distance));
}

// Lanes of a warp; all lanes of the warp take part. kLanes: how many, where the compiler knows.
template <int kLanes = 0>
struct LaneTeam {
    static constexpr bool kMayBeWide = false;
    const int lanes, lane;
    const bool leads;

    FL_DEVICE explicit LaneTeam(int count)
        : lanes(kLanes > 0 ? kLanes : count), lane(threadIdx.x % lanes), leads(lane == 0) {}

    FL_DEVICE void sync() const {
        if (lanes > 1) __syncwarp();
    }
    template <class A, int n, class Combine>
    FL_DEVICE void reduce(A (&x)[n], A, Combine combine) const {
        const auto step = [&](int distance) {
#pragma unroll
            for (int i = 0; i < n; ++i) x[i] = combine(x[i], __shfl_xor_sync(0xffffffffu, x[i], distance));
        };
        if constexpr (kLanes > 0) {
#pragma unroll
            for (int distance = kLanes / 2; distance > 0; distance /= 2) step(distance);
        } else {
#pragma unroll 1
            for (int distance = lanes / 2; distance > 0; distance /= 2) step(distance);
        }
    }
};

// A warp, which the compiler knows to have 32 lanes: those of RowTeam are known at run time.
struct WarpTeam {
    static constexpr bool kMayBeWide = false;  // of more than a warp
    static constexpr int threads = 32;
    const int lane;
    const bool leads;

    FL_DEVICE explicit WarpTeam(const RegisterPlan&) : lane(threadIdx.x % 32), leads(lane == 0) {}

    static FL_DEVICE int num_blocks() { return 1; }
    static FL_DEVICE int block_rank() { return 0; }
    static FL_DEVICE std::int64_t first() { return std::int64_t(blockIdx.x) * (blockDim.x / 32); }
    static FL_DEVICE std::int64_t step() { return std::int64_t(gridDim.x) * (blockDim.x / 32); }
    static FL_DEVICE int place() { return threadIdx.x / 32; }
    static FL_DEVICE void sync() { __syncwarp(); }
    static FL_DEVICE void part_company() {}
    template <class A, int n, class Combine>
    FL_DEVICE void reduce(A (&x)[n], A, Combine combine) const {
        reduce_warp(x, combine);
    }
};

// A warp, a block or the blocks of a cluster; or, for rows that lie side by side, threads of a block that are as many
// apart as it has rows, so that neighbours have neighbouring rows.
template <class A, bool kMayHaveColumns>
class RowTeam {
    const int columns;  // rows side by side of the block; 0: rows have warps or blocks
    unsigned uses = 0;  // of shared memory, in two halves: who is late reads one while others write to the other

public:
    static constexpr bool kMayBeWide = true;
    const int threads, lane;  // in this block
    const bool leads;

    FL_DEVICE explicit RowTeam(const RegisterPlan& plan)
        : columns(kMayHaveColumns && plan.is_column ? static_cast<int>(blockDim.x) / plan.lanes : 0),
          threads(plan.lanes),
          lane(columns > 0     ? threadIdx.x / columns
               : threads == 32 ? threadIdx.x % 32
                               : threadIdx.x),
          leads(lane == 0 && cluster_group::block_rank() == 0) {
        ClusterExchange::begin();
    }

    static FL_DEVICE int num_blocks() { return cluster_group::num_blocks(); }
    static FL_DEVICE int block_rank() { return cluster_group::block_rank(); }

    // Of a block, which has rows first(), first() + 1, ... and then those `step()` further.
    FL_DEVICE int at_once() const {
        return kMayHaveColumns && columns > 0 ? columns : threads == 32 ? static_cast<int>(blockDim.x) / 32 : 1;
    }
    FL_DEVICE std::int64_t first() const { return std::int64_t(blockIdx.x / cluster_group::num_blocks()) * at_once(); }
    FL_DEVICE std::int64_t step() const { return std::int64_t(gridDim.x / cluster_group::num_blocks()) * at_once(); }
    FL_DEVICE int place() const {
        return kMayHaveColumns && columns > 0 ? threadIdx.x % columns : threads == 32 ? threadIdx.x / 32 : 0;
    }

    FL_DEVICE void sync() const { !(kMayHaveColumns && columns > 0) && threads == 32 ? __syncwarp() : __syncthreads(); }
    // For all threads, at the end.
    FL_DEVICE void part_company() const { ClusterExchange::end(); }

    template <int n, class Combine>
    FL_DEVICE void reduce(A (&x)[n], A nothing, Combine combine) {
        if (kMayHaveColumns && columns > 0) {
#pragma unroll
            for (int i = 0; i < n; ++i) reduce_column(x[i], combine);
            return;
        }
        reduce_warp(x, combine);
        if (threads == 32) return;
        __shared__ A of_warp[2][n][kMostThreads / 32];
        const unsigned use = uses++, turn = use % 2;
        const int me = threadIdx.x % 32;
        for (int i = 0; i < n; ++i)
            if (me == 0) of_warp[turn][i][threadIdx.x / 32] = x[i];
        __syncthreads();
        for (int i = 0; i < n; ++i) x[i] = me < threads / 32 ? of_warp[turn][i][me] : nothing;
        reduce_warp(x, combine);
        if constexpr (std::is_same_v<A, float>) {  // doubles have no clusters
            if (cluster_group::num_blocks() == 1) return;
            ClusterExchange::gather(x, nothing, use);
            reduce_warp(x, combine);
        }
    }

    // For rows that are not columns. Sums of threads that are relative to a number, which each warp has in common,
    // become the sum of all relative to the largest of these numbers. relative(a, b): what makes a sum relative to a
    // one that is relative to b.
    template <class Relative>
    FL_DEVICE void merge(float& number, float& sum, Relative relative) {
        float only[] = {sum};
        reduce_warp(only, Plus());
        sum = only[0];
        if (threads == 32) return;
        __shared__ float of_warp[2][2][kMostThreads / 32];
        const unsigned use = uses++, turn = use % 2;
        const int me = threadIdx.x % 32;
        if (me == 0) of_warp[turn][0][threadIdx.x / 32] = number, of_warp[turn][1][threadIdx.x / 32] = sum;
        __syncthreads();
        constexpr float nothing = -std::numeric_limits<float>::infinity();
        const auto merge_lanes = [&](float own, float own_sum) {
            only[0] = own;
            reduce_warp(only, Larger());
            number = only[0];
            only[0] = own_sum * relative(own, number);
            reduce_warp(only, Plus());
            sum = only[0];
        };
        const bool has_part = me < threads / 32;
        merge_lanes(has_part ? of_warp[turn][0][me] : nothing, has_part ? of_warp[turn][1][me] : 0.0f);
        if (cluster_group::num_blocks() == 1) return;
        float both[] = {number, sum};
        ClusterExchange::gather(both, nothing, use);
        merge_lanes(both[0], me < cluster_group::num_blocks() ? both[1] : 0.0f);
    }

private:
    template <class Combine>
    FL_DEVICE void reduce_column(A& x, Combine combine) {
        if (threads == 1) return;
        __shared__ A of_thread[2][kMostColumnThreads];
        const unsigned turn = uses++ % 2;
        of_thread[turn][threadIdx.x] = x;
        __syncthreads();
        const int column = threadIdx.x % columns;
        x = of_thread[turn][column];
        for (int i = 1; i < threads; ++i) x = combine(x, of_thread[turn][column + i * columns]);
    }
};

}  // namespace fused_losses::cuda
