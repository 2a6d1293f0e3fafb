// What tiles of a PassLoss need and what does not depend on the loss: compiled once per arithmetic type.
#pragma once

#include "cpu/gradient_rows.h"
#include "cpu/lane_block.h"

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

// A tile of rows, worked on a block at a time. A block consists of parts; each part has its own sums over classes.
// - lanes: a part is a vector of rows. Its logits, later its gradient, are in scratch as [classes][vector of rows].
// - otherwise: a part is one row, in the caller's memory if it can be read and written there, else in scratch.
// Numbers per row (maximum, state, sums) are vectors over the rows of a group: with lanes a group is a part, otherwise
// the whole block. With lanes a block has several groups: with few classes the arithmetic that follows a sum takes
// longer than the sum, and while one group waits for it, the next one goes on.
template <class A, bool lanes>
class PassRows {
public:
    using V = Vec<A>;
    static constexpr int kGroups = lanes ? Tiling::kFewRows / V::size : 1;
    static constexpr int kMaxParts = lanes ? kGroups : V::size, kRowsOfPart = lanes ? V::size : 1;
    using PerGroup = std::array<V, kGroups>;

    PassRows(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          tile_rows(tile_rows),
          block(std::min(static_cast<int>(tile_rows), V::size * (p.num_classes > Tiling::kFewClasses ? 1 : kGroups))),
          whole(lanes ? p.num_classes : p.num_classes / V::size),
          tail(lanes ? 0 : static_cast<int>(p.num_classes % V::size)),
          scratch(parts_of(lanes ? tile_rows : block) * vectors() * V::size),
          gradient_rows(problem, lanes ? 0 : block, bytes_of(problem.dtype)) {
        with_stored<A>(p, [&]<class Stored>() {
            constexpr bool as_stored = !lanes && std::is_same_v<Stored, A>;
            reads_directly = as_stored && p.logits_class_stride == 1;
            writes_directly = as_stored && p.grad_class_stride == 1;
            streams = lanes && LaneBlock<Stored>::streams(p);
        });
    }

    ~PassRows() {
        if (streams) stream_fence();
    }

    // Calls body(number of its first row) for each block of the tile's rows [first, first + n), with their logits or
    // without; it gives all parts a gradient if there is one.
    template <class Body>
    void for_blocks(std::int64_t outer, std::int64_t first, int n, bool with_logits, Body body) {
        reads = with_logits;
        this->outer = outer;
        rows.begin(p, outer, first, n);
        with_stored<A>(p, [&]<class Stored>() {
            if (lanes && reads) LaneBlock<Stored>::load_tile(p, outer, first, n, rows, scratch.data());
        });
        for (int at = 0; at < n; at += block) {
            take(first, at, std::min(block, n - at));
            body(outer * p.inner + first + at);
            if (p.grad) finish_gradient(first);
        }
        with_stored<A>(p, [&]<class Stored>() {
            const auto as_it_is = [](int) FL_INLINE { return [](V x, std::int64_t) FL_INLINE { return x; }; };
            if (lanes && p.grad) LaneBlock<Stored>::store_tile(p, outer, first, n, scratch.data(), as_it_is);
        });
    }

    // RowProblem::bits are in vectors: one after the other for a part, and its parts for an image.
    static std::int64_t bits_bytes(const RowProblem& p) {
        return p.outer * bit_vectors_of_image(p) * sizeof(VectorBits<A>);
    }

    // Null if there are none.
    VectorBits<A>* bits_of(int part) const {
        const std::int64_t of_image = (next - row_count) / kRowsOfPart + part;
        return p.bits ? static_cast<VectorBits<A>*>(p.bits) + outer * bit_vectors_of_image(p) + of_image * vectors()
                      : nullptr;
    }

    // Calls body(part) for the parts that are to be computed.
    template <class Body>
    FL_HD void for_parts(Body body) const {
        for (int part = 0; part < parts_of(row_count); ++part)
            if (lanes || !rows.ignored(first_row + part)) body(part);
    }

    // Calls body(group) for those that have rows.
    template <class Body>
    FL_HD void for_groups(Body body) const {
        for (int group = 0; group < kGroups && group * V::size < row_count; ++group) body(group);
    }

    // Weighs values of a group, writes them and adds them up. Rows whose loss is positive make the denominator of
    // kActiveMean. Its rows are numbered from `row` on, as all below.
    void finish(int group, std::int64_t row, V values, TileSums& sums) {
        A lane[V::size];
        values.store(lane);
        A* const out = static_cast<A*>(p.row_values);
        for (int i = 0; i < rows_in(group); ++i) {
            const int at = first_in(group) + i;
            const bool ignored = rows.ignored(at);
            const A weighted = ignored ? A(0) : rows.sample_weight[at] * rows.class_weight[at] * lane[i];
            if (out) out[row + i] = weighted;
            sums.value += weighted;
            const bool active = !ignored && !(lane[i] <= A(0));  // NaN counts
            if (active) sums.weight += double(rows.class_weight[at]) * double(rows.sample_weight[at]);
        }
    }

    void save(int group, std::int64_t row, const V* state, int states) const {
        A* const stats = static_cast<A*>(p.stats);
        const Mask<A> ignored = per_row(group, rows.counted) == V(A(0));
        for (int k = 0; k < states; ++k)
            fused_losses::store(stats + k * p.rows() + row, math::select(ignored, V(A(0)), state[k]), rows_in(group));
    }

    void restore(int group, std::int64_t row, V* state, int states) const {
        const A* const stats = as<A>(p.stats);
        for (int k = 0; k < states; ++k)
            state[k] = fused_losses::load(stats + k * p.rows() + row, rows_in(group), A(0));
    }

    V per_row(int group, const A* numbers) const { return V::load(numbers + first_in(group)); }

    // The margin of each row's target.
    V margins(int group) const {
        if (!p.margin) return A(p.params[0]);
        A margins[V::size];
        const std::int64_t* const targets = rows.target + first_in(group);
        for (int i = 0; i < V::size; ++i) margins[i] = as<A>(p.margin)[targets[i] * p.margin_stride];
        return V::load(margins);
    }

    // The margins of classes, a vector at a time; without any per class `of_row`.
    struct ClassMargins {
        const A* per_class;
        std::int64_t stride;
        V of_row;

        template <class Count>
        FL_HD V at(std::int64_t k, Count count) const {
            if (!per_class) return of_row;
            if (lanes || stride == 0) return per_class[lanes ? k * stride : 0];
            return fused_losses::load(per_class + k * V::size, count, A(0));
        }
    };

    ClassMargins class_margins(V of_row) const { return {as<A>(p.margin), p.margin_stride, of_row}; }

    // Calls body(k, count, is_target, add) for every vector k of a part, the last of which may have but `count`
    // elements; sum = add(sum, x) leaves out the others. Between runs of vectors it calls end_run().
    template <class Body, class EndRun = void (*)()>
    FL_HD void for_each(int part, Body body, EndRun end_run = [] {}) const {
        const V own = in_part(target[group_of(part)], part);
        V number = lanes ? V(A(0)) : V::iota();  // of each element's class
        for_runs(whole, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) FL_INLINE {
            if (begin > 0) end_run();
            for (std::int64_t k = begin; k < end; ++k) {
                body(k, Whole{}, number == own, [](V sum, V x) { return sum + x; });
                number += A(lanes ? 1 : V::size);
            }
        });
        if (tail == 0) return;
        const Mask<A> is_class = V::iota() < V(A(tail));
        body(whole, tail, number == own, [=](V sum, V x) { return sum + math::select(is_class, x, V(A(0))); });
    }

    // The same; while this part is computed, its counterpart in the next block (in lanes: tile) is fetched and the
    // gradient of the previous one leaves.
    template <class Body, class EndRun = void (*)()>
    FL_HD void for_each_fetching(int part, Body body, EndRun end_run = [] {}) {
        // Where there is nothing to fetch, the same line again and again: cheaper than to ask each time.
        const char *next_logits = static_cast<const char*>(p.logits), *next_grad = next_logits;
        std::int64_t logits_step = 0, grad_step = 0;
        with_stored<A>(p, [&]<class Stored>() {
            const std::int64_t row = next + (lanes ? tile_rows - row_count : 0) + part * kRowsOfPart;
            if (reads && (lanes || p.logits_class_stride == 1)) {
                next_logits = reinterpret_cast<const char*>(row_of<Stored>(row));
                logits_step = (p.logits_class_stride == 1 ? V::size : p.logits_class_stride) * sizeof(Stored);
            }
            const Stored* const grad = p.grad_class_stride == 1 ? gradient_rows.to_fetch<Stored>(outer, row) : nullptr;
            if (!grad) return;
            next_grad = reinterpret_cast<const char*>(grad);
            grad_step = V::size * sizeof(Stored);
        });
        Lines lines = gradient_rows.lines;  // a copy can stay in registers
        const auto fetch_and_compute = [&](std::int64_t k, auto count, Mask<A> is_target, auto add) FL_INLINE {
            lines.send_one();
            __builtin_prefetch(next_logits + k * logits_step, /*for writing=*/0,
                               /*into the second cache*/ lanes ? 2 : 3);
            __builtin_prefetch(next_grad + k * grad_step, /*for writing=*/1);
            body(k, count, is_target, add);
        };
        for_each(part, fetch_and_compute, end_run);
        gradient_rows.lines = lines;
    }

    // NaN skipped.
    PerGroup find_max() const {
        constexpr A lowest = -std::numeric_limits<A>::infinity();
        PerGroup all;
        all.fill(V(A(0)));
        for_parts([&](int part) {
            if (lanes) return put(all[part], part, per_row(part, rows.max));
            V top[4] = {lowest, lowest, lowest, lowest};
            for_vectors_ahead<A, 4>(p.num_classes, [&](std::int64_t i, auto count, auto chain) {
                top[chain] = max(top[chain], fused_losses::load(logits[part] + i, count, lowest));
            });
            put(all[0], part, max(max(top[0], top[1]), max(top[2], top[3])).max());
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

    FL_HD static int group_of(int part) { return lanes ? part : 0; }
    V total(V partial) const { return lanes ? partial : V(partial.sum()); }
    std::int64_t vectors() const { return whole + (tail > 0); }  // of a part
    static int parts_of(int rows) { return lanes ? (rows + V::size - 1) / V::size : rows; }

    const RowProblem& p;
    const std::int64_t tile_rows;
    const int block;
    const std::int64_t whole;  // vectors, and elements of the last one if it is not full
    const int tail;
    TileRows<A> rows;
    int first_row, row_count;    // of the tile that are taken
    const A* logits[kMaxParts];  // of each part
    A* gradient[kMaxParts];      // of each part: where to write it; may be where its logits are

private:
    static std::int64_t bit_vectors_of_image(const RowProblem& p) {
        const std::int64_t parts = (p.inner + kRowsOfPart - 1) / kRowsOfPart;
        return parts * (lanes ? p.num_classes : (p.num_classes + V::size - 1) / V::size);
    }

    // Rows [at, at + count) of the tile.
    void take(std::int64_t first, int at, int count) {
        first_row = at;
        row_count = count;
        next = first + at + count;
        for (int part = 0; lanes && part < parts_of(count); ++part)
            logits[part] = gradient[part] = scratch_of(at / V::size + part);
        with_stored<A>(p, [&]<class Stored>() {
            for (int i = 0; !lanes && i < count; ++i) {
                if (p.grad) gradient[i] = gradient_place<Stored>(first + at + i, i);
                if (reads && !rows.ignored(at + i)) load_row<Stored>(first + at + i, i);
            }
        });
        for_groups([&](int group) {
            for (int i = 0; i < V::size; ++i) target[group].v[i] = A(rows.target[first_in(group) + i]);
        });
    }

    // Once `gradient` has those of all parts: ignored rows get zeros; rows in scratch go to the caller.
    void finish_gradient(std::int64_t first) {
        for (int i = 0; i < row_count && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(first_row + i); ++c)
                (lanes ? gradient[i / V::size][c * V::size + i % V::size] : gradient[i][c]) = A(0);
        if (lanes) return;
        with_stored<A>(p, [&]<class Stored>() {
            const std::int64_t row = first + first_row;
            for (int i = 0; !writes_directly && i < row_count; ++i)
                RowBuffer<Stored>::write_row(
                    p, gradient_rows.row<Stored>(outer, row + i, i), /*unordered=*/false,
                    [&](std::int64_t c, auto count) { return fused_losses::load(gradient[i] + c, count, A(0)); });
            gradient_rows.finish<Stored>(outer, row, row_count);
        });
    }

    int first_in(int group) const { return first_row + group * V::size; }
    int rows_in(int group) const { return std::min(V::size + 0, row_count - group * V::size); }  // no reference to size

    template <class Stored>
    const Stored* row_of(std::int64_t row) const {
        return as<Stored>(p.logits) + p.logits_stride.at(outer, row);
    }

    template <class Stored>
    A* gradient_place(std::int64_t row, int part) const {
        if constexpr (std::is_same_v<Stored, A>)
            if (writes_directly) return gradient_rows.row<Stored>(outer, row, part);
        return scratch_of(part);
    }

    template <class Stored>
    void load_row(std::int64_t row, int part) {
        const std::int64_t own = rows.target[first_row + part];
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly && rows.bias == A(0)) {
                logits[part] = row_of<Stored>(row);
                rows.target_logit[first_row + part] = logits[part][own];
                return;
            }
        A* const copy = scratch_of(part);
        RowBuffer<Stored>::widen_row(row_of<Stored>(row), p.logits_class_stride, p.num_classes, copy);
        copy[own] += rows.bias;
        logits[part] = copy;
        rows.target_logit[first_row + part] = copy[own];
    }

    A* scratch_of(int part) const { return scratch.data() + part * vectors() * V::size; }

    Scratch<A> scratch;
    GradientRows gradient_rows;
    bool reads_directly, writes_directly, streams, reads;
    std::int64_t outer, next;  // the row behind them
    PerGroup target;           // class numbers
};

}  // namespace FL_ISA
}  // namespace fused_losses
