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

// A block of rows at a time, its logits in scratch as whole vectors: [classes][vector of rows], which is one part, or a
// part of its own for each row, padded to whole vectors of classes. Numbers per row are a vector with an element for
// each row of the block either way.
template <class A, bool lanes>
class PassRows {
public:
    using V = Vec<A>;

    PassRows(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          block(lanes ? V::size : static_cast<int>(std::min<std::int64_t>(tile_rows, V::size))),
          whole(lanes ? p.num_classes : p.num_classes / V::size),
          tail(lanes ? 0 : static_cast<int>(p.num_classes % V::size)),
          store(parts_of(block) * vectors() * V::size) {
        with_stored<A>(p, [&]<class Stored>() { streams = !lanes && RowBuffer<Stored>::streams(p); });
    }

    ~PassRows() {
        if (streams) stream_fence();
    }

    // Loads rows [at, at + count) of the tile, at most `block`.
    void load(std::int64_t outer, std::int64_t first, int at, int count) {
        with_stored<A>(p, [&]<class Stored>() {
            if (lanes) return LaneBlock<Stored>::load_logits(p, outer, first + at, rows, at, count, x(0));
            for (int i = 0; i < count; ++i) {
                if (rows.ignored(at + i)) continue;
                const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, first + at + i);
                RowBuffer<Stored>::widen_row(source, p.logits_class_stride, p.num_classes, x(i));
                for (int k = tail; k < V::size && tail > 0; ++k) x(i)[whole * V::size + k] = A(0);
                A& own = x(i)[rows.target[at + i]];
                own += rows.bias;
                rows.target_logit[at + i] = own;
            }
        });
        for (int i = 0; i < V::size; ++i) target.v[i] = A(rows.target[at + i]);
        first_row = at;
        row_count = count;
        next = first + at + count;
        this->outer = outer;
    }

    // Calls body(part) for the parts that are to be computed.
    template <class Body>
    FL_HD void for_parts(Body body) const {
        for (int part = 0; part < parts_of(row_count); ++part)
            if (lanes || !rows.ignored(first_row + part)) body(part);
    }

    // Writes the scratch as the gradient of the loaded rows; ignored ones get zeros.
    void store_gradient(std::int64_t outer, std::int64_t first) {
        for (int i = 0; i < row_count && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(first_row + i); ++c)
                (lanes ? x(0)[c * V::size + i] : x(i)[c]) = A(0);
        with_stored<A>(p, [&]<class Stored>() {
            const std::int64_t row = first + first_row;
            if (lanes) return LaneBlock<Stored>::store_gradient(p, outer, row, row_count, x(0));
            for (int i = 0; i < row_count; ++i)
                RowBuffer<Stored>::write_row(
                    p, RowBuffer<Stored>::gradient(p, outer, row + i), streams, /*unordered=*/false,
                    [&](std::int64_t c, auto count) { return fused_losses::load(x(i) + c, count, A(0)); });
        });
    }

    // Weighs values, writes them and adds them up. Rows whose loss is positive make the denominator of kActiveMean.
    void finish(std::int64_t row, V values, TileSums& sums) {
        A lane[V::size];
        values.store(lane);
        A* const out = static_cast<A*>(p.row_values);
        for (int i = 0; i < row_count; ++i) {
            const int at = first_row + i;
            const bool ignored = rows.ignored(at);
            const A weighted = ignored ? A(0) : rows.sample_weight[at] * rows.class_weight[at] * lane[i];
            if (out) out[row + i] = weighted;
            sums.value += weighted;
            const bool active = !ignored && !(lane[i] <= A(0));  // NaN counts
            if (active) sums.weight += double(rows.class_weight[at]) * double(rows.sample_weight[at]);
        }
    }

    void save(const V* state, int states, std::int64_t row) const {
        A* const stats = static_cast<A*>(p.stats);
        const Mask<A> ignored = per_row(rows.counted) == V(A(0));
        for (int k = 0; k < states; ++k)
            fused_losses::store(stats + k * p.rows() + row, math::select(ignored, V(A(0)), state[k]), row_count);
    }

    void restore(V* state, int states, std::int64_t row) const {
        const A* const stats = as<A>(p.stats);
        for (int k = 0; k < states; ++k) state[k] = fused_losses::load(stats + k * p.rows() + row, row_count, A(0));
    }

    V per_row(const A* numbers) const { return V::load(numbers + first_row); }

    // The margin of each row's target.
    V margins() const {
        if (!p.margin) return A(p.params[0]);
        A margins[V::size];
        for (int i = 0; i < V::size; ++i) margins[i] = as<A>(p.margin)[rows.target[first_row + i] * p.margin_stride];
        return V::load(margins);
    }

    // The margin of the classes in vector k.
    V margin_at(std::int64_t k, V otherwise) const {
        if (!p.margin) return otherwise;
        const A* const margin = as<A>(p.margin);
        if (lanes || p.margin_stride == 0) return margin[lanes ? k * p.margin_stride : 0];
        return fused_losses::load(margin + k * V::size, k < whole ? V::size : tail, A(0));
    }

    // Calls body(k, is_target, add) for every vector k of a part; sum = add(sum, x) leaves out what is no class.
    template <class Body>
    FL_HD void for_each(int part, Body body) const {
        const V own = in_part(target, part);
        V number = lanes ? V(A(0)) : V::iota();  // of each element's class
        for (std::int64_t k = 0; k < whole; ++k) {
            body(k, number == own, [](V sum, V x) { return sum + x; });
            number += A(lanes ? 1 : V::size);
        }
        if (tail == 0) return;
        const Mask<A> is_class = V::iota() < V(A(tail));
        body(whole, number == own, [=](V sum, V x) { return sum + math::select(is_class, x, V(A(0))); });
    }

    // The same; while this part is computed, its counterpart in the next block is fetched.
    template <class Body>
    FL_HD void for_each_fetching(int part, Body body) const {
        const char *logits = nullptr, *grad = nullptr;
        std::int64_t step = 0;
        with_stored<A>(p, [&]<class Stored>() {
            step = V::size * sizeof(Stored);
            if (p.logits_class_stride == 1)
                logits = reinterpret_cast<const char*>(as<Stored>(p.logits) + p.logits_stride.at(outer, next + part));
            if (p.grad && p.grad_class_stride == 1 && !streams)
                grad = reinterpret_cast<const char*>(RowBuffer<Stored>::gradient(p, outer, next + part));
        });
        for_each(part, [&](std::int64_t k, Mask<A> is_target, auto add) FL_INLINE {
            if (logits) __builtin_prefetch(logits + k * step, /*for writing=*/0);
            if (grad) __builtin_prefetch(grad + k * step, /*for writing=*/1);
            body(k, is_target, add);
        });
    }

    // NaN skipped.
    V find_max() const {
        constexpr A lowest = -std::numeric_limits<A>::infinity();
        V all = A(0);
        for_parts([&](int part) {
            V top = lowest;
            for (std::int64_t k = 0; k < whole; ++k) top = max(top, V::load(x(part) + k * V::size));
            if (tail > 0) top = max(top, fused_losses::load(x(part) + whole * V::size, tail, lowest));
            put(all, part, lanes ? top : V(top.max()));
        });
        return all;
    }

    // The numbers of a part's rows, for the elements of its vectors.
    FL_HD static V in_part(V numbers, int part) { return lanes ? numbers : V(numbers.v[part]); }
    FL_HD static void put(V& numbers, int part, V of_part) {
        if (lanes)
            numbers = of_part;
        else
            numbers.v[part] = of_part.v[0];
    }

    A* x(int part) const { return store.data() + part * vectors() * V::size; }
    V total(V partial) const { return lanes ? partial : V(partial.sum()); }
    std::int64_t vectors() const { return whole + (tail > 0); }  // of a part
    static int parts_of(int rows) { return lanes ? 1 : rows; }

    const RowProblem& p;
    const int block;
    const std::int64_t whole;  // vectors, and elements of the last one if it is not full
    const int tail;
    TileRows<A> rows;
    int first_row, row_count;  // of the tile that are loaded

private:
    Scratch<A> store;
    bool streams;
    std::int64_t outer, next;  // the row behind them
    V target;                  // class numbers
};

}  // namespace FL_ISA
}  // namespace fused_losses
