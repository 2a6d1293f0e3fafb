// One-pass ("online") softmax sums and their deterministic combination over the threads of a row.
#pragma once

#include <limits>

#include "core/math.h"
#include "cuda/row_team.cuh"

namespace fused_losses::cuda {

// Of the logits z seen so far: max, sum = sum exp(z - max), centred = sum u (z - pivot),
// sum_u = sum u. The pivot is max, or 0 as long as max is -inf: -inf - -inf must not turn a row with masked
// classes into NaN. NaN never becomes max, but makes sum NaN; so does +inf.
template <class A>
struct SoftmaxState {
    A max, sum, centred, sum_u;

    static FL_DEVICE SoftmaxState empty() { return {-std::numeric_limits<A>::infinity(), A(0), A(0), A(0)}; }

    static FL_DEVICE A larger(A a, A b) { return b > a ? b : a; }
    static FL_DEVICE A pivot_of(A top) { return top == -std::numeric_limits<A>::infinity() ? A(0) : top; }

    // Expresses the sums relative to another pivot. A max of -inf comes with sum 0, and exp(-inf) = 0 keeps
    // it so.
    FL_DEVICE void move_to(A top, A pivot) {
        sum *= math::exp(max - pivot);
        centred += sum_u * (pivot_of(max) - pivot);
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
        // A class of weight zero contributes nothing, even at -inf.
        centred += u == A(0) ? A(0) : u * distance;
        sum_u += u;
    }
};

// The sums of all threads that share a row; each of them gets the result. Maxima first: no exponentials are taken on
// the way.
template <class Team, class A>
FL_DEVICE void reduce_team(Team& team, SoftmaxState<A>& state) {
    const A top = largest_of(team, state.max);
    state.move_to(top, state.pivot_of(top));
    A sums[] = {state.sum, state.centred, state.sum_u};
    team.reduce(sums, A(0), Plus());
    state.sum = sums[0], state.centred = sums[1], state.sum_u = sums[2];
}

}  // namespace fused_losses::cuda
