// What tiles of a PassLoss need and what does not depend on the loss: compiled once per arithmetic type.
#pragma once

#include "cpu/lane_block.h"
#include "cpu/row_buffer.h"
#include "cpu/scratch.h"

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

// One view of the logits at a time, in scratch as whole vectors: [classes][vector of rows] for a block of rows, or one
// row padded to whole vectors of classes.
template <class A, bool lanes>
class PassRows {
public:
    using V = Vec<A>;

    explicit PassRows(const RowProblem& problem)
        : p(problem),
          whole(lanes ? p.num_classes : p.num_classes / V::size),
          tail(lanes ? 0 : static_cast<int>(p.num_classes % V::size)),
          store((whole + (tail > 0)) * V::size) {}

    // Loads rows [at, at + count) of the tile; a single one unless rows are lanes.
    void load(std::int64_t outer, std::int64_t first, int at, int count) {
        with_stored<A>(p, [&]<class Stored>() {
            look_ahead<Stored>(outer, first + at + count);
            if (lanes) return LaneBlock<Stored>::load_logits(p, outer, first + at, rows, at, count, x());
            const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, first + at);
            RowBuffer<Stored>::widen_row(source, p.logits_class_stride, p.num_classes, x());
        });
        if (lanes) {
            for (int i = 0; i < V::size; ++i) target.v[i] = A(rows.target[at + i]);
            return;
        }
        for (int i = tail; i < V::size && tail > 0; ++i) x()[whole * V::size + i] = A(0);
        A& own = x()[rows.target[at]];
        own += rows.bias;
        rows.target_logit[at] = own;
        target = A(rows.target[at]);
    }

    // Writes the scratch as the gradient of the loaded rows.
    void store_gradient(std::int64_t outer, std::int64_t first, int at, int count) {
        for (int i = 0; i < count && lanes && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(at + i); ++c) x()[c * V::size + i] = A(0);
        with_stored<A>(p, [&]<class Stored>() {
            if (lanes) return LaneBlock<Stored>::store_gradient(p, outer, first + at, count, x());
            RowBuffer<Stored>::narrow_row(x(), p.grad_class_stride, p.num_classes,
                                          RowBuffer<Stored>::gradient(p, outer, first + at));
        });
    }

    // Outputs of an ignored row that is not loaded.
    void skip(std::int64_t outer, std::int64_t row, int states) {
        const std::int64_t number = outer * p.inner + row;
        if (p.row_values) static_cast<A*>(p.row_values)[number] = A(0);
        for (int k = 0; k < states; ++k) static_cast<A*>(p.stats)[k * p.rows() + number] = A(0);
        if (p.grad) with_stored<A>(p, [&]<class Stored>() { RowBuffer<Stored>::zero_gradient(p, outer, row); });
    }

    // Weighs values, writes them and adds them up. Rows whose loss is positive make the denominator of kActiveMean.
    void finish(std::int64_t outer, std::int64_t first, int at, int count, V values, TileSums& sums) {
        A lane[V::size];
        values.store(lane);
        A* const out = static_cast<A*>(p.row_values);
        for (int i = 0; i < count; ++i) {
            const bool ignored = rows.ignored(at + i);
            const A weighted = ignored ? A(0) : rows.sample_weight[at + i] * rows.class_weight[at + i] * lane[i];
            if (out) out[outer * p.inner + first + at + i] = weighted;
            sums.value += weighted;
            const bool active = !ignored && !(lane[i] <= A(0));  // NaN counts
            if (active) sums.weight += double(rows.class_weight[at + i]) * double(rows.sample_weight[at + i]);
        }
    }

    void save(const V* state, int states, std::int64_t row, int count) const {
        A* const stats = static_cast<A*>(p.stats);
        for (int k = 0; k < states; ++k) fused_losses::store(stats + k * p.rows() + row, state[k], count);
    }

    void restore(V* state, int states, std::int64_t row, int count) const {
        const A* const stats = as<A>(p.stats);
        for (int k = 0; k < states; ++k) {
            const A* const from = stats + k * p.rows() + row;
            state[k] = lanes ? fused_losses::load(from, count, A(0)) : V(*from);
        }
    }

    V per_row(const A* numbers, int at) const { return lanes ? V::load(numbers + at) : V(numbers[at]); }

    // The margin of each row's target.
    V margin_of(int at) const {
        if (!p.margin) return A(p.params[0]);
        A margins[V::size];
        for (int i = 0; i < V::size; ++i)
            margins[i] = as<A>(p.margin)[rows.target[lanes ? at + i : at] * p.margin_stride];
        return V::load(margins);
    }

    // The margin of the classes in vector k.
    V margin_at(std::int64_t k, V otherwise) const {
        if (!p.margin) return otherwise;
        const A* const margin = as<A>(p.margin);
        if (lanes || p.margin_stride == 0) return margin[lanes ? k * p.margin_stride : 0];
        return fused_losses::load(margin + k * V::size, k < whole ? V::size : tail, A(0));
    }

    // Fetches the part of the next rows' memory that vector k has in these rows'.
    FL_HD void prefetch(std::int64_t k) const {
        if (next_logits) __builtin_prefetch(next_logits + k * vector_bytes, /*for writing=*/0);
        if (next_grad) __builtin_prefetch(next_grad + k * vector_bytes, /*for writing=*/1);
    }

    // Calls body(k, is_target, add) for every vector k of the scratch; sum = add(sum, x) leaves out what is no class.
    template <class Body>
    FL_HD void for_each(Body body) const {
        V number = lanes ? V(A(0)) : V::iota();  // of each element's class
        for (std::int64_t k = 0; k < whole; ++k) {
            body(k, number == target, [](V sum, V x) { return sum + x; });
            number += A(lanes ? 1 : V::size);
        }
        if (tail == 0) return;
        const Mask<A> is_class = V::iota() < V(A(tail));
        body(whole, number == target, [=](V sum, V x) { return sum + math::select(is_class, x, V(A(0))); });
    }

    // NaN skipped.
    V find_max() const {
        V top = -std::numeric_limits<A>::infinity();
        for (std::int64_t k = 0; k < whole; ++k) top = max(top, V::load(x() + k * V::size));
        if (tail > 0)
            top = max(top, fused_losses::load(x() + whole * V::size, tail, -std::numeric_limits<A>::infinity()));
        return lanes ? top : V(top.max());
    }

    A* x() const { return store.data(); }
    std::int64_t vectors() const { return whole + (tail > 0); }
    V total(V partial) const { return lanes ? partial : V(partial.sum()); }

    const RowProblem& p;
    const std::int64_t whole;  // vectors, and elements of the last one if it is not full
    const int tail;
    TileRows<A> rows;

private:
    template <class Stored>
    void look_ahead(std::int64_t outer, std::int64_t next) {
        vector_bytes = V::size * sizeof(Stored);
        next_logits = next_grad = nullptr;
        if (p.logits_class_stride == 1)
            next_logits = reinterpret_cast<const char*>(as<Stored>(p.logits) + p.logits_stride.at(outer, next));
        if (p.grad && p.grad_class_stride == 1)
            next_grad = reinterpret_cast<const char*>(RowBuffer<Stored>::gradient(p, outer, next));
    }

    Scratch<A> store;
    const char *next_logits, *next_grad;
    std::int64_t vector_bytes;
    V target;  // class numbers
};

}  // namespace FL_ISA
}  // namespace fused_losses
