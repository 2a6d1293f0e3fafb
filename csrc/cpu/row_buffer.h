// Rows whose classes are taken a vector at a time: reading a row as contiguous numbers and writing its gradient.
#pragma once

#include <type_traits>

#include "cpu/tile_rows.h"
#include "cpu/vec.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
struct RowBuffer {
    using A = acc_t<Stored>;

    template <class Source>
    static void widen_row(const Source* source, std::int64_t stride, std::int64_t n, A* out) {
        if (stride != 1) {
            for (std::int64_t c = 0; c < n; ++c) out[c] = widen(source[c * stride]);
            return;
        }
        for_vectors<A>(n, [=](std::int64_t c, auto count) { store(out + c, load(source + c, count, A(0)), count); });
    }

    static void narrow_row(const A* x, std::int64_t stride, std::int64_t n, Stored* out) {
        if (stride != 1) {
            for (std::int64_t c = 0; c < n; ++c) out[c * stride] = narrow<Stored>(x[c]);
            return;
        }
        for_vectors<A>(n, [=](std::int64_t c, auto count) { store(out + c, load(x + c, count, A(0)), count); });
    }

    static bool reads_directly(const RowProblem& p) { return std::is_same_v<Stored, A> && p.logits_class_stride == 1; }

    // The row's logits as contiguous A: the caller's memory where possible, else a copy in `out`.
    static const A* logits(const RowProblem& p, std::int64_t outer, std::int64_t row, A* out) {
        const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, row);
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly(p)) return source;
        widen_row(source, p.logits_class_stride, p.num_classes, out);
        return out;
    }

    static Stored* gradient(const RowProblem& p, std::int64_t outer, std::int64_t row) {
        return static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, row);
    }

    static void zero_gradient(const RowProblem& p, std::int64_t outer, std::int64_t row) {
        Stored* const grad = gradient(p, outer, row);
        for (std::int64_t c = 0; c < p.num_classes; ++c) grad[c * p.grad_class_stride] = narrow<Stored>(A(0));
    }

    // The gradient of a vector of classes from c on.
    template <class Count>
    static void write(const RowProblem& p, Stored* grad, std::int64_t c, Vec<A> value, Count count) {
        const std::int64_t stride = p.grad_class_stride;
        if (stride == 1) return store(grad + c, value, count);
        A lane[Vec<A>::size];
        value.store(lane);
        for (int i = 0; i < Vec<A>::size && c + i < p.num_classes; ++i)
            grad[(c + i) * stride] = narrow<Stored>(lane[i]);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
