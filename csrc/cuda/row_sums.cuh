// The simplest way to share rows: the lanes of a warp, or a few of them, have one, or each thread has one. Reductions
// over its classes.
#pragma once

#include <limits>

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

constexpr int kWarp = 32;

// Calls body.operator()<kThreads>() with how many lanes are to share a row. What is done once a row is then shared by
// as many rows as a warp has at the same time.
template <class Body>
cudaError_t with_lanes(std::int64_t classes, std::int64_t class_stride, Body body) {
    constexpr int few_classes = 16, many_classes = 256;
    if (class_stride != 1 || classes <= few_classes) return body.template operator()<1>();
    return classes <= many_classes ? body.template operator()<8>() : body.template operator()<kWarp>();
}

// Calls body(number) for the rows of the thread, of which lanes of a warp are to take as many: all of them take part in
// shuffles. Beyond the last row there is that row once more, for which the same is written again.
template <int kThreads, class Body>
FL_DEVICE void each_row(std::int64_t rows, Body body) {
    const std::int64_t step = std::int64_t(gridDim.x) * (kBlock / kThreads);
    const int in_warp = kThreads > 1 ? threadIdx.x % kWarp / kThreads : 0;
    std::int64_t number = std::int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
    for (; number - in_warp < rows; number += step) body(number < rows ? number : rows - 1);
}

// kThreads: lanes that share a row.
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
