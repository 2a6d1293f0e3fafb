// A row as one thread sees it: every step-th class, wherever the row lies and whatever its dtype is. The dtype is a
// branch that all threads take alike, and the thread has floats in its registers: what is done with them is compiled
// once.
#pragma once

#include <limits>

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

// Where a row begins, and how far apart its classes are, in bytes.
struct RowPlace {
    const char* from;
    char* to;
    std::int64_t from_step, to_step;
};

FL_DEVICE RowPlace place_of(const RowProblem& p, const Row& row) {
    const int element = bytes_of(p.dtype);
    return {static_cast<const char*>(p.logits) + p.logits_stride.at(row.outer, row.inner) * element,
            static_cast<char*>(p.grad) + (p.grad ? p.grad_stride.at(row.outer, row.inner) * element : 0),
            p.logits_class_stride * element, p.grad_class_stride * element};
}

// The classes first + k * step, k < count. `most`: of the thread of the row that has most of them.
struct ClassesOfThread {
    int first, step, count, most;

    // Of [begin, end), shared by `threads` threads, one by one or, with `side_by_side`, so many to each.
    FL_DEVICE ClassesOfThread(int begin, int end, int lane, int threads)
        : first(begin + lane),
          step(threads),
          count(end > first ? static_cast<unsigned>(end - first - 1) / static_cast<unsigned>(threads) + 1 : 0),
          most(end > begin ? static_cast<unsigned>(end - begin - 1) / static_cast<unsigned>(threads) + 1 : 0) {}
    FL_DEVICE ClassesOfThread(int classes, int lane, int each)
        : first(lane * each), step(1), count(max(0, min(each, classes - first))), most(min(each, classes)) {}

    // The number k of a class, if it is one of them, else something negative or beyond.
    FL_DEVICE int place_of(int cls) const {
        const int distance = cls - first;
        if (step == 1) return distance;
        if (distance < 0) return -1;
        const int k = static_cast<unsigned>(distance) / static_cast<unsigned>(step);
        return k * step == distance ? k : -1;
    }
};

template <class A>
FL_DEVICE A read_logit(Dtype dtype, const RowPlace& place, int cls) {
    A z = A(0);
    with_stored<A>(dtype, [&]<class Stored>() {
        z = to_acc(*reinterpret_cast<const Stored*>(place.from + cls * place.from_step));
    });
    return z;
}

// Room for some numbers of each of the thread's classes begin, begin + 1, ..., n to a class, in shared memory.
template <class A, int n>
struct Slots {
    A* const first;

    FL_DEVICE A* of(int k) const { return first + k * n; }
};

constexpr int kAtOnce = 8;  // loads in flight

// The logits of the classes first + k * step, begin <= k < count, kAtOnce at most; what is beyond is -inf.
template <class A>
FL_DEVICE void read_logits(Dtype dtype, const RowPlace& place, const ClassesOfThread& classes, int begin, int count,
                           A (&z)[kAtOnce]) {
    const char* const from = place.from + (classes.first + std::int64_t(begin) * classes.step) * place.from_step;
    const std::int64_t step = classes.step * place.from_step;
    with_stored<A>(dtype, [&]<class Stored>() {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            z[i] = begin + i < count ? to_acc(*reinterpret_cast<const Stored*>(from + i * step))
                                     : -std::numeric_limits<A>::infinity();
    });
}

// The last number of each of `count` slots becomes the logit of the class first + (begin + k) * step.
template <class A, int n>
FL_DEVICE void read_into(const Slots<A, n>& slots, Dtype dtype, const RowPlace& place, const ClassesOfThread& classes,
                         int begin, int count) {
#pragma unroll 1
    for (int k = 0; k < count; k += kAtOnce) {
        A z[kAtOnce];
        read_logits(dtype, place, classes, begin + k, begin + count, z);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (k + i < count) slots.of(k + i)[n - 1] = z[i];
    }
}

// The other way round.
template <class A, int n>
FL_DEVICE void write_from(const Slots<A, n>& slots, Dtype dtype, const RowPlace& place, const ClassesOfThread& classes,
                          int begin, int count) {
    char* to = place.to + (classes.first + std::int64_t(begin) * classes.step) * place.to_step;
    const std::int64_t step = classes.step * place.to_step;
    with_stored<A>(dtype, [&]<class Stored>() {
#pragma unroll 4
        for (int k = 0; k < count; ++k, to += step)
            *reinterpret_cast<Stored*>(to) = to_stored<Stored>(slots.of(k)[n - 1]);
    });
}

}  // namespace fused_losses::cuda
