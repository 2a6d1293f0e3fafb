// A horizontal tile for multi-reduction losses. A part is one row, in the caller's memory if it can be read and
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
    static constexpr Dtype kDtype = sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;  // of A in memory

    HorizontalView(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          whole(p.num_classes / V::size),
          tail(static_cast<int>(p.num_classes % V::size)),
          strip_rows(std::min(static_cast<int>(tile_rows), V::size + 0)),
          scratch(strip_rows * vectors() * V::size),
          gradient_rows(problem, strip_rows),
          reads_directly(p.dtype == kDtype && p.logits_class_stride == 1),
          writes_directly(p.dtype == kDtype && p.grad_class_stride == 1) {}

    template <class Body>
    void for_strips(std::int64_t of_outer, std::int64_t first, int n, bool with_logits, Body body) {
        reads = with_logits;
        outer = of_outer;
        rows.begin(p, outer, first, n);
        for (first_row = 0; first_row < n; first_row += strip_rows) {
            row_count = std::min(strip_rows + 0, n - first_row);
            next = first + first_row + row_count;
            read_strip();
            body(outer * p.inner + first + first_row);
            if (p.grad) write_strip();
        }
    }

    template <class Body>
    FL_ALWAYS_INLINE void for_groups(Body body) const {
        body(0, first_row, row_count);
    }

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

    static std::int64_t bit_vectors_of_image(const RowProblem& p) {
        return p.inner * divide_up(p.num_classes, V::size);
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

    FL_NOINLINE PerGroup find_max() const {
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

    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each(int part, Body body, EndRun end_run = [] {}) const {
        const std::int64_t target = rows.target[first_row + part];
        const auto behind_target = [=](std::int64_t k) FL_INLINE { return V::iota() + V(A(k * V::size - target)); };
        for_class_vectors(whole, behind_target, V(A(V::size)), body, end_run);
        if (tail == 0) return;
        const Mask<A> is_class = first_n<A>(tail), is_target = behind_target(whole) == V(A(0));
        body(whole, tail, is_target, [=](V sum, V x) { return sum + math::select(is_class, x, V(A(0))); });
    }

    // Fetches the part's counterpart in the next strip, while the gradient of the previous one leaves.
    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each_fetching(int part, Body body, EndRun end_run = [] {}) {
        const Prefetch next_strip = with_stored<A>(p.dtype, [&]<class Stored>() {
            const bool fetches_logits = reads && p.logits_class_stride == 1, fetches_grad = p.grad_class_stride == 1;
            return Prefetch(p, fetches_logits ? logits_at<Stored>(p, outer, next + part) : nullptr, V::size,
                            fetches_grad ? gradient_rows.to_fetch<Stored>(outer, next + part) : nullptr, V::size);
        });
        Lines lines = gradient_rows.lines;  // a copy can stay in registers
        const auto fetch_and_compute = [&](std::int64_t k, auto count, Mask<A> is_target, auto add) FL_INLINE {
            lines.send_one();
            next_strip.fetch<3>(k);
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
    FL_NOINLINE void read_strip() {
        with_stored<A>(p.dtype, [&]<class Stored>() { take_rows<Stored>(); });
    }
    FL_NOINLINE void write_strip() {
        with_stored<A>(p.dtype, [&]<class Stored>() { finish_gradient<Stored>(); });
    }

    // Finds a place for the gradient of the strip's rows, and their logits where they are asked for.
    template <class Stored>
    void take_rows() {
        for (int i = 0; i < row_count; ++i) {
            const std::int64_t row = next - row_count + i;
            gradient_of[i] = scratch_of(i);
            if constexpr (std::is_same_v<Stored, A>)
                if (p.grad && writes_directly) gradient_of[i] = gradient_rows.row<Stored>(outer, row, i);
            if (reads && !rows.ignored(first_row + i)) logits_of[i] = load_row<Stored>(row, i);
        }
    }

    template <class Stored>
    const A* load_row(std::int64_t row, int i) {
        const Stored* const given = logits_at<Stored>(p, outer, row);
        const std::int64_t target = rows.target[first_row + i];
        A& target_logit = rows.target_logit[first_row + i];
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly && rows.bias == A(0)) return target_logit = given[target], given;
        A* const copy = scratch_of(i);
        RowBuffer<Stored>::widen_row(given, p.logits_class_stride, p.num_classes, copy);
        target_logit = copy[target] += rows.bias;
        return copy;
    }

    // Once all parts have a gradient: ignored rows get zeros; rows in scratch go to the caller.
    template <class Stored>
    void finish_gradient() {
        for (int i = 0; i < row_count && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(first_row + i); ++c) gradient(i)[c] = A(0);
        const std::int64_t row = next - row_count;
        for (int i = 0; !writes_directly && i < row_count; ++i)
            RowBuffer<Stored>::write_row(
                p, gradient_rows.row<Stored>(outer, row + i, i), /*unordered=*/false,
                [&](std::int64_t c, auto count) { return load_n_or(gradient(i) + c, count, A(0)); });
        gradient_rows.finish<Stored>(outer, row, row_count);
    }

    A* scratch_of(int part) const { return scratch.data() + part * vectors() * V::size; }

    const int strip_rows;
    const Scratch<A> scratch;
    GradientRows gradient_rows;
    const bool reads_directly, writes_directly;
    bool reads;
    int first_row, row_count;  // of the strip, in the tile
    std::int64_t outer, next;  // the row behind the strip
    const A* logits_of[V::size];
    A* gradient_of[V::size];  // where to write it; may be where its logits are
};

}  // namespace FL_ISA
}  // namespace fused_losses
