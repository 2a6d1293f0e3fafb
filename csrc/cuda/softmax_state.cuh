// One-pass ("online") softmax sums and their deterministic combination over the threads of a row.
#pragma once

#include <limits>

#include "core/math.h"
#include "cuda/team.cuh"

namespace fused_losses::cuda {

// Shuffles are by whole warps, also where a part of one shares a row: a mask that the compiler does not know becomes a
// loop of votes.
constexpr unsigned kAllLanes = 0xffffffffu;

// Of the logits z seen so far: max, sum = sum exp(z - max) and, with kSpread, centred = sum u (z - pivot),
// sum_u = sum u. The pivot is max, or 0 as long as max is -inf: -inf - -inf must not turn a row with masked
// classes into NaN. NaN never becomes max, but makes sum NaN; so does +inf.
template <class A, bool kSpread>
struct SoftmaxState {
    A max, sum, centred, sum_u;

    // Not a constructor: the type has to stay trivial for shared memory.
    static FL_DEVICE SoftmaxState empty() { return {-std::numeric_limits<A>::infinity(), A(0), A(0), A(0)}; }

    static FL_DEVICE A larger(A a, A b) { return b > a ? b : a; }
    static FL_DEVICE A pivot_of(A top) { return top == -std::numeric_limits<A>::infinity() ? A(0) : top; }

    // Expresses the sums relative to another pivot. A max of -inf comes with sum 0, and exp(-inf) = 0 keeps
    // it so.
    FL_DEVICE void move_to(A top, A pivot) {
        sum *= math::exp(max - pivot);
        if constexpr (kSpread) centred += sum_u * (pivot_of(max) - pivot);
        max = top;
    }

    template <int kCount>
    FL_DEVICE void push(const A (&z)[kCount], const A (&u)[kCount]) {
        A top = max;
#pragma unroll
        for (int k = 0; k < kCount; ++k) top = larger(top, z[k]);
        const A pivot = pivot_of(top);
        move_to(top, pivot);
#pragma unroll
        for (int k = 0; k < kCount; ++k) add(z[k] - pivot, u[k], math::exp(z[k] - pivot));
    }

    // One class, by its distance from the pivot.
    FL_DEVICE void add(A distance, A u, A exponential) {
        sum += exponential;
        if constexpr (kSpread) {
            // A class of weight zero contributes nothing, even at -inf.
            centred += u == A(0) ? A(0) : u * distance;
            sum_u += u;
        }
    }

    FL_DEVICE void merge(SoftmaxState other) {
        const A top = larger(max, other.max);
        const A pivot = pivot_of(top);
        move_to(top, pivot);
        other.move_to(top, pivot);
        sum += other.sum;
        if constexpr (kSpread) centred += other.centred, sum_u += other.sum_u;
    }

    // The state of another lane: shuffle(x) fetches one number.
    template <class Shuffle>
    FL_DEVICE SoftmaxState fetched(Shuffle shuffle) const {
        SoftmaxState other = *this;
        other.max = shuffle(max);
        other.sum = shuffle(sum);
        if constexpr (kSpread) {
            other.centred = shuffle(centred);
            other.sum_u = shuffle(sum_u);
        }
        return other;
    }

    // Lane 0 of each group of `width` lanes ends with the sums of its group. For all lanes of a warp.
    FL_DEVICE void reduce_lanes(int width) {
#pragma unroll 1  // waits for other lanes most of the time
        for (int distance = width / 2; distance > 0; distance /= 2)
            merge(fetched([&](A x) { return __shfl_down_sync(kAllLanes, x, distance, width); }));
    }

    FL_DEVICE void take_from_first_lane(int width) {
        *this = fetched([&](A x) { return __shfl_sync(kAllLanes, x, 0, width); });
    }
};

// Combines the sums of all threads that share a row; each of them gets the result. For all lanes of a warp.
template <class State>
FL_DEVICE void reduce_team(Group& group, State& state) {
    const int width = min(group.threads, 32);
    state.reduce_lanes(width);
    if (group.threads < kBlock) return state.take_from_first_lane(width);
    constexpr int warps = kBlock / 32;
    __shared__ State of_warp[warps], of_block;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) of_warp[warp] = state;
    __syncthreads();
    if (warp == 0) {
        state = of_warp[lane % warps];
        state.reduce_lanes(warps);
        if (lane == 0) of_block = state;
    }
    __syncthreads();  // the next row writes of_block after one more barrier
    state = of_block;
    group.turn ^= 1;
    combine_over_cluster(state, group.turn, [](State& mine, const State& other) { mine.merge(other); });
}

template <class State>
FL_DEVICE void reduce_team(const Column& column, State& state) {
    column.merge_parts(state, [](State& mine, const State& other) { mine.merge(other); });
}

}  // namespace fused_losses::cuda
