// What the two views of a tile have in common. Losses of several reductions work on tiles through a view, which says
// which way vectors lie in them: vertical_view.h and horizontal_view.h have the same functions, and MultiReductionTile
// takes either. A view depends on no loss: it is compiled once per arithmetic type.
//
// A tile is worked on a strip of rows at a time. The loops over the classes run over the parts of a strip: a part is
// what has one sum over the classes per element of a vector, or per vector. Numbers of which a row has one (maximum,
// state, sums) are kept as vectors of rows, called groups.
#pragma once

#include "cpu/memory.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

// Calls body.operator()<Stored>() for the dtype of the logits, one of those computed in A.
template <class A, class Body>
void with_stored(const RowProblem& p, Body body) {
    if constexpr (std::is_same_v<A, double>) {
        body.template operator()<double>();
    } else {
        switch (p.dtype) {
            case Dtype::kFloat16: return body.template operator()<Half>();
            case Dtype::kBFloat16: return body.template operator()<BFloat16>();
            default: return body.template operator()<float>();
        }
    }
}

// Calls body(k, Whole{}, is_target, add) for the vectors k in [0, n) of a part, and end_run() between runs of them.
// `number` holds the class of each element of the first vector, `step` how much it grows, `target` the row's target.
template <class V, class Body, class EndRun>
FL_ALWAYS_INLINE void for_class_vectors(std::int64_t n, V number, V step, V target, Body body, EndRun end_run) {
    for_runs(n, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) FL_INLINE {
        if (begin > 0) end_run();
        for (std::int64_t k = begin; k < end; ++k) {
            body(k, Whole{}, number == target, [](V sum, V x) { return sum + x; });
            number += step;
        }
    });
}

// What is fetched while vector k of a part is computed. Where there is nothing to fetch, it is the same line again and
// again: cheaper than to ask each time.
struct Prefetch {
    const char *logits, *grad;
    std::int64_t logits_step = 0, grad_step = 0;

    explicit Prefetch(const RowProblem& p) : logits(static_cast<const char*>(p.logits)), grad(logits) {}

    template <class Stored>
    void set_logits(const Stored* from, std::int64_t step) {
        logits = reinterpret_cast<const char*>(from);
        logits_step = step * std::int64_t(sizeof(Stored));
    }
    template <class Stored>
    void set_gradient(const Stored* to, std::int64_t step) {
        grad = reinterpret_cast<const char*>(to);
        grad_step = step * std::int64_t(sizeof(Stored));
    }

    // locality: 3 into the first cache, 2 into the second.
    template <int locality>
    FL_ALWAYS_INLINE void operator()(std::int64_t k) const {
        __builtin_prefetch(logits + k * logits_step, /*for writing=*/0, locality);
        __builtin_prefetch(grad + k * grad_step, /*for writing=*/1);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
