// Where kernels leave the statistics of a row (core/row_statistics.h).
#pragma once

#include <cmath>
#include <limits>

#include "core/row_statistics.h"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

struct Smaller {  // NaN loses
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return std::fmin(a, b);
    }
};

// By one thread. sum: of the exponentials; index: of the largest logit; logit_of(cls): read again where there is NaN.
template <class A, class LogitOf>
FL_DEVICE void write_row_statistics(const RowProblem& p, std::int64_t number, const Target& target, A sum, int index,
                                    RowStatisticsOf<A> found, LogitOf logit_of) {
    if (!(sum > A(0))) {  // rare
        const int classes = static_cast<int>(p.num_classes);
        int nan = 0;
        while (nan < classes && logit_of(nan) == logit_of(nan)) ++nan;
        if (nan < classes) index = nan;
        leave_undefined(found, nan < classes);
    }
    p.argmax[number] = index;
    A* const to = static_cast<A*>(p.row_statistics) + number;
    for (int k = 0; k < kRowStatistics; ++k)
        to[k * p.rows()] = target.ignored ? std::numeric_limits<A>::quiet_NaN() : found.v[k];
}

}  // namespace fused_losses::cuda
