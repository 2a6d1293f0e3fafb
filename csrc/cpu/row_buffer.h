// Rows whose classes are taken a vector at a time: reading a row as contiguous numbers and writing its gradient.
#pragma once

#include <type_traits>

#include "cpu/memory.h"
#include "cpu/tile_rows.h"

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
        for_vectors<A>(
            n, [=](std::int64_t c, auto count) { store_n(out + c, load_n_or(source + c, count, A(0)), count); });
    }

    static bool reads_directly(const RowProblem& p) { return std::is_same_v<Stored, A> && p.logits_class_stride == 1; }

    // The row's logits as contiguous A: the caller's memory where possible, else a copy in `out`.
    static const A* logits(const RowProblem& p, std::int64_t outer, std::int64_t row, A* out) {
        const Stored* const source = logits_at<Stored>(p, outer, row);
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly(p)) return source;
        widen_row(source, p.logits_class_stride, p.num_classes, out);
        return out;
    }

    static void zero_gradient(const RowProblem& p, Stored* grad) {
        for (std::int64_t c = 0; c < p.num_classes; ++c) grad[c * p.grad_class_stride] = narrow<Stored>(A(0));
    }

    // Writes the gradient of a row; value(c, count) is that of the classes from c on. If `unordered`, values come in
    // the order of pairs (cpu/memory.h).
    template <class Value>
    static void write_row(const RowProblem& p, Stored* grad, bool unordered, Value value) {
        const auto write = [&](std::int64_t c, auto count) { store_n(grad + c, value(c, count), count); };
        const std::int64_t classes = p.num_classes;
        if (p.grad_class_stride != 1) return write_strided(p, grad, value);
        if constexpr (sizeof(Stored) == 2)
            if (unordered) return write_pairs(grad, classes, value);
        for_vectors<A>(classes, write);
    }

private:
    template <class Value>
    static void write_pairs(Stored* grad, std::int64_t classes, Value value) {
        constexpr int size = Vec<A>::size;
        std::int64_t c = 0;
        for (; c + 2 * size <= classes; c += 2 * size)
            Pair<Stored>{value(c, Whole{}), value(c + size, Whole{})}.store(grad + c);
        for_vectors<A>(classes - c,
                       [&](std::int64_t rest, auto count) { store_n(grad + c + rest, value(c + rest, count), count); });
    }

    template <class Value>
    static void write_strided(const RowProblem& p, Stored* grad, Value value) {
        for_vectors<A>(p.num_classes, [&](std::int64_t c, auto count) {
            A lane[Vec<A>::size];
            value(c, count).store(lane);
            for (int i = 0; i < Vec<A>::size && c + i < p.num_classes; ++i)
                grad[(c + i) * p.grad_class_stride] = narrow<Stored>(lane[i]);
        });
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
