// A row at a time, as whole vectors of classes: rows are copied into scratch that is filled up behind the last class,
// so that loops over few classes are as short as they look.
#pragma once

#include <cstring>
#include <limits>

#include "cpu/row_buffer.h"
#include "cpu/scratch.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
class PaddedRow {
    using V = Vec<A>;

public:
    explicit PaddedRow(std::int64_t num_classes, A behind = A(0))
        : classes(num_classes), padded(divide_up(classes, V::size) * V::size), room(padded) {
        for (std::int64_t c = classes; c < padded; ++c) room.data()[c] = behind;
    }

    // Elements `stride` apart; the row without a copy where it is all whole vectors already.
    template <class Stored>
    const A* read(const Stored* from, std::int64_t stride) const {
        A* const to = room.data();
        if constexpr (std::is_same_v<Stored, A>) {
            if (stride == 1 && padded == classes) return from;
            if (stride == 1) return std::memcpy(to, from, classes * sizeof(A)), to;
        }
        if constexpr (std::is_same_v<acc_t<Stored>, A>)
            RowBuffer<Stored>::widen_row(from, stride, classes, to);
        else  // doubles are for checking, not for speed
            for (std::int64_t c = 0; c < classes; ++c) to[c] = A(widen(from[c * stride]));
        return to;
    }

    A* data() const { return room.data(); }

    const std::int64_t classes, padded;

private:
    const Scratch<A> room;
};

// body(c) is what the vector of classes from c on adds.
template <class A, class Body>
FL_ALWAYS_INLINE A sum_of_row(std::int64_t padded, Body body) {
    constexpr int size = Vec<A>::size;
    Vec<A> sums[4] = {A(0), A(0), A(0), A(0)};
    std::int64_t c = 0;
    for (; c + 4 * size <= padded; c += 4 * size) unrolled<4>([&](auto k) FL_INLINE { sums[k] += body(c + k * size); });
    for (; c < padded; c += size) sums[0] += body(c);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

// NaN skipped.
template <class A>
FL_ALWAYS_INLINE A max_of_row(const A* z, std::int64_t padded) {
    constexpr int size = Vec<A>::size;
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    Vec<A> top[4] = {lowest, lowest, lowest, lowest};
    std::int64_t c = 0;
    for (; c + 4 * size <= padded; c += 4 * size)
        unrolled<4>([&](auto k) FL_INLINE { top[k] = max(top[k], Vec<A>::load(z + c + k * size)); });
    for (; c < padded; c += size) top[0] = max(top[0], Vec<A>::load(z + c));
    return max(max(top[0], top[1]), max(top[2], top[3])).max();
}

}  // namespace FL_ISA
}  // namespace fused_losses
