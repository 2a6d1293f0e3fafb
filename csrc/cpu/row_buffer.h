// Rows whose classes are taken a vector at a time: reading a row as contiguous numbers and writing its gradient.
#pragma once

#include <type_traits>

#include "cpu/tile_rows.h"
#include "cpu/memory.h"

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

    // Whether gradients are so large that stores past the caches, which need not read what they overwrite, take less
    // time (a seventh for 80 MB; for 16 MB it was no gain). Rows have to be long, because the cache lines that they
    // share with their neighbours take longer: with rows of 600 bytes all took twice the time. They need
    // stream_fence() in the end.
    static bool streams(const RowProblem& p) {
        constexpr std::int64_t kStreamedBytes = 64 << 20, kStreamedRow = 16 << 10;
        const std::int64_t row = p.num_classes * std::int64_t(sizeof(Stored));
        return p.grad && p.grad_class_stride == 1 && row >= kStreamedRow && p.rows() * row >= kStreamedBytes;
    }

    // The gradient of a row, value(c, count) being that of the classes from c on; `unordered`: in the order of pairs
    // (cpu/memory.h).
    template <class Value>
    static void write_row(const RowProblem& p, Stored* grad, bool streams, bool unordered, Value value) {
        const auto write = [&](std::int64_t c, auto count) { store(grad + c, value(c, count), count); };
        const std::int64_t classes = p.num_classes;
        if (p.grad_class_stride != 1) return write_strided(p, grad, value);
        if constexpr (sizeof(Stored) == 2)
            if (unordered) return write_pairs(grad, classes, value);
        if (!streams) return for_vectors<A>(classes, write);
        constexpr int size = Vec<A>::size;
        const auto misaligned = reinterpret_cast<std::uintptr_t>(grad) / sizeof(Stored) % size;
        const std::int64_t head = std::min<std::int64_t>((size - misaligned) % size, classes);
        std::int64_t c = head;
        if (head > 0) write(0, static_cast<int>(head));
        for (; c + size <= classes; c += size) stream(grad + c, value(c, Whole{}));
        if (c < classes) write(c, static_cast<int>(classes - c));
    }

private:
    template <class Value>
    static void write_pairs(Stored* grad, std::int64_t classes, Value value) {
        constexpr int size = Vec<A>::size;
        std::int64_t c = 0;
        for (; c + 2 * size <= classes; c += 2 * size)
            Pair<Stored>{value(c, Whole{}), value(c + size, Whole{})}.store(grad + c);
        for_vectors<A>(classes - c,
                       [&](std::int64_t rest, auto count) { store(grad + c + rest, value(c + rest, count), count); });
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
