// Multi-reduction losses work on tiles through a view, vertical_view.h or horizontal_view.h, which knows which
// way vectors lie. A view depends on no loss: it is compiled once per arithmetic type.
//
// A tile is worked on a strip of rows at a time. The loops over the classes run over the parts of a strip: a part is a
// row, or a vector of rows. Numbers of which a row has one (maximum, state, sums) are vectors of rows, called groups.
// Views have
//
//     for_strips(outer, first, n, with_logits, body)   body(number of its first row) for each strip of the tile's rows
//                                                      [first, first + n); gives every part a gradient if there is one
//     for_groups(body)                                 body(group, at, n) for the strip's groups: rows [at, at + n)
//     for_parts(body)                                  body(part) for the parts that are to be computed
//     in_part(numbers, part)                           a group's numbers for the elements of a part's vectors
//     put_total(group, part, sums)                     the other way: what the elements of a part have added up
//     for_each(part, body, end_run)                    body(k, count, is_target, add) for every vector of classes; the
//                                                      last may have but `count` elements, add(sum, x) leaves out the
//                                                      others; end_run() between runs of vectors
//     for_each_fetching(part, body, end_run)           the same, while memory that is needed next is fetched
//     find_max()                                       of every group, NaN skipped
//     bit_vectors_of_image, first_bit_vector           RowProblem::bits are in vectors, as for_each goes through them
#pragma once

#include "cpu/memory.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

// Calls body(k, Whole{}, is_target, add) for the vectors k in [0, n) of a part, and end_run() between runs of them.
// behind_target(k) holds how many classes each element of vector k lies behind the row's target, `step` is how much
// that grows. Floats have no number for every class beyond 2^24, but exact ones for those within a run of the target.
template <class V, class BehindTarget, class Body, class EndRun>
FL_ALWAYS_INLINE void for_class_vectors(std::int64_t n, BehindTarget behind_target, V step, Body body, EndRun end_run) {
    for_runs(n, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) FL_INLINE {
        if (begin > 0) end_run();
        V behind = behind_target(begin);
        for (std::int64_t k = begin; k < end; ++k) {
            body(k, Whole{}, behind == V{}, [](V sum, V x) { return sum + x; });
            behind += step;
        }
    });
}

// What is fetched while vector k of a part is computed. Where there is nothing to fetch (null), it is the same line
// again and again: cheaper than to ask each time.
struct Prefetch {
    const char *logits, *grad;
    std::int64_t logits_step, grad_step;

    template <class Stored>
    Prefetch(const RowProblem& p, const Stored* from, std::int64_t from_step, const Stored* to, std::int64_t to_step)
        : logits(as<char>(from ? from : p.logits)),
          grad(as<char>(to ? to : p.logits)),
          logits_step(from ? from_step * std::int64_t(sizeof(Stored)) : 0),
          grad_step(to ? to_step * std::int64_t(sizeof(Stored)) : 0) {}

    // locality: 3 into the first cache, 2 into the second.
    template <int locality>
    FL_ALWAYS_INLINE void fetch(std::int64_t k) const {
        __builtin_prefetch(logits + k * logits_step, /*for writing=*/0, locality);
        __builtin_prefetch(grad + k * grad_step, /*for writing=*/1);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
