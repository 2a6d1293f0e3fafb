// A horizontal tile for losses of several reductions. A part is one row, in the caller's memory if it can be read and
// written there, else in scratch. A strip is one group: as many rows as a vector has elements.
#pragma once

#include "cpu/gradient_rows.h"
#include "cpu/tile_view.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
class HorizontalView {
public:
    using V = Vec<A>;
    static constexpr int kGroups = 1;
    using PerGroup = std::array<V, 1>;

    HorizontalView(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          whole(p.num_classes / V::size),
          tail(static_cast<int>(p.num_classes % V::size)),
          strip_rows(std::min(static_cast<int>(tile_rows), V::size + 0)),
          scratch(strip_rows * vectors() * V::size),
          gradient_rows(problem, strip_rows) {
        with_stored<A>(p, [&]<class Stored>() {
            reads_directly = std::is_same_v<Stored, A> && p.logits_class_stride == 1;
            writes_directly = std::is_same_v<Stored, A> && p.grad_class_stride == 1;
        });
    }

    // Calls body(number of its first row) for each strip of the tile's rows [first, first + n), with their logits or
    // without; it gives all parts a gradient if there is one.
    template <class Body>
    void for_strips(std::int64_t of_outer, std::int64_t first, int n, bool with_logits, Body body) {
        reads = with_logits;
        outer = of_outer;
        rows.begin(p, outer, first, n);
        for (int at = 0; at < n; at += strip_rows) {
            take(first, at, std::min(strip_rows, n - at));
            body(outer * p.inner + first + at);
            if (p.grad) finish_gradient(first);
        }
    }

    // Calls body(group, at, n) for the strip's rows, the tile's [at, at + n).
    template <class Body>
    FL_ALWAYS_INLINE void for_groups(Body body) const {
        body(0, first_row, row_count);
    }

    // Calls body(part) for the parts that are to be computed.
    template <class Body>
    FL_ALWAYS_INLINE void for_parts(Body body) const {
        for (int part = 0; part < row_count; ++part)
            if (!rows.ignored(first_row + part)) body(part);
    }

    FL_ALWAYS_INLINE static int group_of(int) { return 0; }
    FL_ALWAYS_INLINE static V in_part(V numbers, int part) { return numbers.v[part]; }
    FL_ALWAYS_INLINE static void put_total(V& of_group, int part, V sums) { of_group.v[part] = sums.sum(); }

    std::int64_t vectors() const { return whole + (tail > 0); }  // of a part
    int parts() const { return strip_rows; }
    const A* logits(int part) const { return logits_of[part]; }
    A* gradient(int part) const { return gradient_of[part]; }

    // RowProblem::bits are one vector after the other of a row, and the rows of an image.
    static std::int64_t bit_vectors_of_image(const RowProblem& p) {
        return p.inner * ((p.num_classes + V::size - 1) / V::size);
    }
    std::int64_t first_bit_vector(int part) const {
        return outer * bit_vectors_of_image(p) + (next - row_count + part) * vectors();
    }

    // The margins of classes, a vector at a time; without any per class `of_row`.
    struct ClassMargins {
        const A* per_class;
        std::int64_t stride;
        V of_row;

        template <class Count>
        FL_ALWAYS_INLINE V at(std::int64_t k, Count count) const {
            if (!per_class) return of_row;
            return stride == 0 ? V(per_class[0]) : load_n_or(per_class + k * V::size, count, A(0));
        }
    };

    // NaN skipped.
    PerGroup find_max() const {
        constexpr A lowest = -std::numeric_limits<A>::infinity();
        PerGroup all;
        all.fill(V(A(0)));
        for_parts([&](int part) {
            V top[4] = {lowest, lowest, lowest, lowest};
            for_vectors_ahead<A, 4>(p.num_classes, [&](std::int64_t i, auto count, auto chain) {
                top[chain] = max(top[chain], load_n_or(logits(part) + i, count, lowest));
            });
            all[0].v[part] = max(max(top[0], top[1]), max(top[2], top[3])).max();
        });
        return all;
    }

    // Calls body(k, count, is_target, add) for every vector k of a part, the last of which may have but `count`
    // elements; sum = add(sum, x) leaves out the others. Between runs of vectors it calls end_run().
    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each(int part, Body body, EndRun end_run = [] {}) const {
        const V target = A(rows.target[first_row + part]);
        for_class_vectors(whole, V::iota(), V(A(V::size)), target, body, end_run);
        if (tail == 0) return;
        const V number = V::iota() + V(A(whole * V::size));
        const Mask<A> is_class = first_n<A>(tail);
        body(whole, tail, number == target, [=](V sum, V x) { return sum + math::select(is_class, x, V(A(0))); });
    }

    // The same; while this part is computed, its counterpart in the next strip is fetched and the gradient of the
    // previous one leaves.
    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each_fetching(int part, Body body, EndRun end_run = [] {}) {
        Prefetch prefetch(p);
        with_stored<A>(p, [&]<class Stored>() {
            const std::int64_t row = next + part;
            if (reads && p.logits_class_stride == 1) prefetch.set_logits(logits_at<Stored>(p, outer, row), V::size);
            if (p.grad_class_stride != 1) return;
            if (const Stored* const grad = gradient_rows.to_fetch<Stored>(outer, row))
                prefetch.set_gradient(grad, V::size);
        });
        Lines lines = gradient_rows.lines;  // a copy can stay in registers
        const auto fetch_and_compute = [&](std::int64_t k, auto count, Mask<A> is_target, auto add) FL_INLINE {
            lines.send_one();
            prefetch.template operator()<3>(k);
            body(k, count, is_target, add);
        };
        for_each(part, fetch_and_compute, end_run);
        gradient_rows.lines = lines;
    }

    const RowProblem& p;
    const std::int64_t whole;  // vectors of a part, and elements of the last one if it is not full
    const int tail;
    TileRows<A> rows;

private:
    // Rows [at, at + count) of the tile.
    void take(std::int64_t first, int at, int count) {
        first_row = at;
        row_count = count;
        next = first + at + count;
        with_stored<A>(p, [&]<class Stored>() {
            for (int i = 0; i < count; ++i) {
                if (p.grad) gradient_of[i] = gradient_place<Stored>(first + at + i, i);
                if (reads && !rows.ignored(at + i)) load_row<Stored>(first + at + i, i);
            }
        });
    }

    // Once all parts have a gradient: ignored rows get zeros; rows in scratch go to the caller.
    void finish_gradient(std::int64_t first) {
        for (int i = 0; i < row_count && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(first_row + i); ++c) gradient(i)[c] = A(0);
        with_stored<A>(p, [&]<class Stored>() {
            const std::int64_t row = first + first_row;
            for (int i = 0; !writes_directly && i < row_count; ++i)
                RowBuffer<Stored>::write_row(
                    p, gradient_rows.row<Stored>(outer, row + i, i), /*unordered=*/false,
                    [&](std::int64_t c, auto count) { return load_n_or(gradient(i) + c, count, A(0)); });
            gradient_rows.finish<Stored>(outer, row, row_count);
        });
    }

    template <class Stored>
    A* gradient_place(std::int64_t row, int part) const {
        if constexpr (std::is_same_v<Stored, A>)
            if (writes_directly) return gradient_rows.row<Stored>(outer, row, part);
        return scratch_of(part);
    }

    template <class Stored>
    void load_row(std::int64_t row, int part) {
        const std::int64_t target = rows.target[first_row + part];
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly && rows.bias == A(0)) {
                logits_of[part] = logits_at<Stored>(p, outer, row);
                rows.target_logit[first_row + part] = logits(part)[target];
                return;
            }
        A* const copy = scratch_of(part);
        RowBuffer<Stored>::widen_row(logits_at<Stored>(p, outer, row), p.logits_class_stride, p.num_classes, copy);
        copy[target] += rows.bias;
        logits_of[part] = copy;
        rows.target_logit[first_row + part] = copy[target];
    }

    A* scratch_of(int part) const { return scratch.data() + part * vectors() * V::size; }

    const int strip_rows;
    const Scratch<A> scratch;
    GradientRows gradient_rows;
    bool reads_directly, writes_directly, reads;
    int first_row, row_count;  // of the strip, in the tile
    std::int64_t outer, next;  // the row behind the strip
    const A* logits_of[V::size];
    A* gradient_of[V::size];  // where to write it; may be where its logits are
};

}  // namespace FL_ISA
}  // namespace fused_losses
