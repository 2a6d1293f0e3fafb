// Reductions over a row of contiguous classes, a vector at a time.
#pragma once

#include <limits>

#include "cpu/memory.h"

namespace fused_losses {
inline namespace FL_ISA {

// body(c, count) is what the classes from c on add; zeros behind the last.
template <class A, class Body>
FL_ALWAYS_INLINE A sum_of_row(std::int64_t classes, Body body) {
    Vec<A> sums[4] = {A(0), A(0), A(0), A(0)};
    for_vectors_ahead<A, 4>(classes, [&](std::int64_t c, auto count, auto k) FL_INLINE { sums[k] += body(c, count); });
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

// NaN skipped.
template <class A>
FL_ALWAYS_INLINE A max_of_row(const A* z, std::int64_t classes) {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    Vec<A> top[4] = {lowest, lowest, lowest, lowest};
    for_vectors_ahead<A, 4>(classes, [&](std::int64_t c, auto count, auto k)
                                         FL_INLINE { top[k] = max(top[k], load_n_or(z + c, count, lowest)); });
    return max(max(top[0], top[1]), max(top[2], top[3])).max();
}

}  // namespace FL_ISA
}  // namespace fused_losses
