// The simplest way to share rows: the lanes of a warp, or a few of them, have one, or each thread has one. Reductions
// over its classes.
#pragma once

#include <limits>

#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

constexpr int kWarp = 32;

// How many lanes are to share a row. What is done once a row is then shared by as many rows as a warp has at the same
// time.
FL_HD int lanes_for(std::int64_t classes, std::int64_t class_stride) {
    constexpr int few_classes = 16, many_classes = 256;
    if (class_stride != 1 || classes <= few_classes) return 1;
    return classes <= many_classes ? 8 : kWarp;
}

// Calls body.operator()<kThreads>() with their number.
template <class Body>
cudaError_t with_lanes(std::int64_t classes, std::int64_t class_stride, Body body) {
    switch (lanes_for(classes, class_stride)) {
        case 1: return body.template operator()<1>();
        case 8: return body.template operator()<8>();
        default: return body.template operator()<kWarp>();
    }
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

// Of so many lanes of a warp, for all of them.
template <int kThreads, class T, class Combine>
FL_DEVICE T over_lanes(T x, Combine combine) {
#pragma unroll
    for (int distance = kThreads / 2; distance > 0; distance /= 2)
        x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
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

    // body(first class, logits) for n classes at a time, kThreads apart; beyond the row they are -inf.
    template <int n, class A, class Logit, class Body>
    FL_DEVICE void each_few(Logit logit, Body body) const {
#pragma unroll 1
        for (int c = first; c < classes; c += n * kThreads) {
            A z[n];
            if (c + (n - 1) * kThreads < classes) {
#pragma unroll
                for (int k = 0; k < n; ++k) z[k] = logit(c + k * kThreads);
            } else {
#pragma unroll
                for (int k = 0; k < n; ++k)
                    z[k] = c + k * kThreads < classes ? logit(c + k * kThreads) : -std::numeric_limits<A>::infinity();
            }
            body(c, z);
        }
    }

    // Every lane gets the sum over the row.
    template <class A, class Of>
    FL_DEVICE A sum(Of of) const {
        A sum = A(0);
        each([&](int c) { sum += of(c); });
        return over_lanes<kThreads>(sum, [](A a, A b) { return a + b; });
    }

    // NaN skipped.
    template <class A, class Of>
    FL_DEVICE A max(Of of) const {
        A top = -std::numeric_limits<A>::infinity();
        each([&](int c) { top = of(c) > top ? of(c) : top; });
        return over_lanes<kThreads>(top, [](A a, A b) { return b > a ? b : a; });
    }
};

// Up to kHeld classes of a row for each of the lanes that share it: their numbers stay in registers.
template <int kThreads, int kHeld>
struct HeldClasses {
    const int first, classes;

    FL_DEVICE explicit HeldClasses(const RowProblem& p)
        : first(threadIdx.x % kThreads), classes(static_cast<int>(p.num_classes)) {}

    FL_DEVICE int class_of(int k) const { return first + k * kThreads; }
    FL_DEVICE bool has(int k) const { return class_of(k) < classes; }

    template <class Body>
    static FL_DEVICE void each(Body body) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) body(k);
    }

    // Of numbers `stride` apart; beyond the row they are `none`.
    template <class A, class Stored>
    FL_DEVICE void read(A (&x)[kHeld], const Stored* row, std::int64_t stride, A none) const {
        row += first * stride;
        each([&](int k) {
            x[k] = has(k) ? A(to_acc(*row)) : none;
            row += kThreads * stride;
        });
    }
    template <class Stored, class Of>
    FL_DEVICE void write(Stored* row, std::int64_t stride, Of of) const {
        stride += classes < 0;  // never: stores to neighbours off one address look like one that was taken apart
        row += first * stride;
        each([&](int k) {
            if (has(k)) *row = of(k);
            row += kThreads * stride;
        });
    }
    template <class A, class Of>
    FL_DEVICE A sum(Of of) const {
        A sum = A(0);
        each([&](int k) { sum += of(k); });
        return over_lanes<kThreads>(sum, [](A a, A b) { return a + b; });
    }
    template <class A>
    FL_DEVICE A max(const A (&x)[kHeld]) const {
        A top = x[0];
        each([&](int k) { top = math::larger(x[k], top); });
        return over_lanes<kThreads>(top, [](A a, A b) { return math::larger(b, a); });
    }
};

}  // namespace fused_losses::cuda
