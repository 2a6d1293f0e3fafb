// The simplest way to share rows: the lanes of a warp have one, or each thread has one. Reductions over its classes.
#pragma once

#include <limits>

#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

constexpr int kWarp = 32;
constexpr int kFewClasses = 16;  // less than half of a warp would have something to do

// kThreads: of a row, a warp or one.
template <int kThreads>
struct ClassesOfLane {
    const int first, classes;

    FL_DEVICE explicit ClassesOfLane(const RowProblem& p)
        : first(threadIdx.x % kThreads), classes(static_cast<int>(p.num_classes)) {}

    template <class Body>
    FL_DEVICE void each(Body body) const {
        for (int c = first; c < classes; c += kThreads) body(c);
    }

    // Every lane gets the sum over the row.
    template <class A, class Of>
    FL_DEVICE A sum(Of of) const {
        A sum = A(0);
        each([&](int c) { sum += of(c); });
#pragma unroll
        for (int distance = kThreads / 2; distance > 0; distance /= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        return sum;
    }

    // NaN skipped.
    template <class A, class Of>
    FL_DEVICE A max(Of of) const {
        A top = -std::numeric_limits<A>::infinity();
        each([&](int c) { top = of(c) > top ? of(c) : top; });
#pragma unroll
        for (int distance = kThreads / 2; distance > 0; distance /= 2) {
            const A other = __shfl_xor_sync(0xffffffffu, top, distance);
            top = other > top ? other : top;
        }
        return top;
    }
};

}  // namespace fused_losses::cuda
