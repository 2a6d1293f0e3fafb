// A vertical tile for multi-reduction losses. A part is a vector of rows with its block [classes][vector of rows]
// of logits, over which the gradient is written; it is its own group. A strip has several: with few classes the
// arithmetic that follows a sum takes longer than the sum, and while one group waits for it, the next one goes on.
#pragma once

#include "cpu/tile_view.h"
#include "cpu/vertical_tile.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
class VerticalView : VerticalTile<A> {
    using Tile = VerticalTile<A>;

public:
    using V = Vec<A>;
    using Tile::p, Tile::rows;
    static constexpr int kGroups = Tiling::kVerticalRows / V::size;
    using PerGroup = std::array<V, kGroups>;

    VerticalView(const RowProblem& problem, std::int64_t tile_rows)
        : Tile(problem, tile_rows),
          tile_rows(static_cast<int>(tile_rows)),
          strip_rows(std::min(this->tile_rows, V::size * (p.num_classes > Tiling::kVerticalClasses ? 1 : kGroups))) {}

    template <class Body>
    void for_strips(std::int64_t of_outer, std::int64_t first, int n, bool with_logits, Body body) {
        reads = with_logits;
        outer = of_outer;
        read_tile(first, n);
        for (first_row = 0; first_row < n; first_row += strip_rows) {
            row_count = std::min(strip_rows, n - first_row);
            next = first + first_row + row_count;
            for_groups([&](int group, int at, int) {
                for (int i = 0; i < V::size; ++i) target[group].v[i] = A(rows.target[at + i]);
            });
            body(outer * p.inner + first + first_row);
            if (p.grad) clear_ignored();
        }
        if (p.grad) write_tile(first, n);
    }

    template <class Body>
    FL_ALWAYS_INLINE void for_groups(Body body) const {
        for (int group = 0; group < kGroups && group * V::size < row_count; ++group)
            body(group, first_row + group * V::size, std::min(V::size + 0, row_count - group * V::size));
    }

    template <class Body>
    FL_ALWAYS_INLINE void for_parts(Body body) const {
        for (int part = 0; part * V::size < row_count; ++part) body(part);
    }

    FL_ALWAYS_INLINE static int group_of(int part) { return part; }
    FL_ALWAYS_INLINE static V in_part(V numbers, int) { return numbers; }
    FL_ALWAYS_INLINE static void put_total(V& of_group, int, V sums) { of_group = sums; }

    std::int64_t vectors() const { return whole; }  // of a part
    int parts() const { return divide_up(strip_rows, V::size); }
    const A* logits(int part) const { return block_of(part); }
    A* gradient(int part) const { return block_of(part); }

    static std::int64_t bit_vectors_of_image(const RowProblem& p) {
        return divide_up(p.inner, V::size) * p.num_classes;
    }
    std::int64_t first_bit_vector(int part) const {
        const std::int64_t of_image = (next - row_count) / V::size + part;
        return outer * bit_vectors_of_image(p) + of_image * vectors();
    }

    // The margins of classes, a vector at a time; without any per class `of_row`.
    struct ClassMargins {
        const A* per_class;
        std::int64_t stride;
        V of_row;

        FL_ALWAYS_INLINE V at(std::int64_t k, Whole) const { return per_class ? V(per_class[k * stride]) : of_row; }
    };

    PerGroup find_max() const {
        PerGroup all;
        all.fill(V(A(0)));
        for_groups([&](int group, int at, int) { all[group] = V::load(rows.max + at); });
        return all;
    }

    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each(int part, Body body, EndRun end_run = [] {}) const {
        const V target_class = target[part];
        const auto behind_target = [=](std::int64_t k) FL_INLINE { return V(A(k)) - target_class; };
        for_class_vectors(whole, behind_target, V(A(1)), body, end_run);
    }

    // Fetches the part's counterpart in the next tile.
    template <class Body, class EndRun = void (*)()>
    FL_ALWAYS_INLINE void for_each_fetching(int part, Body body, EndRun end_run = [] {}) const {
        const Prefetch next_tile = with_stored<A>(p.dtype, [&]<class Stored>() {
            const std::int64_t row = next + tile_rows - row_count + part * V::size, step = p.logits_class_stride;
            return Prefetch(p, reads ? logits_at<Stored>(p, outer, row) : nullptr, step == 1 ? V::size : step,
                            p.grad && p.grad_class_stride == 1 ? grad_at<Stored>(p, outer, row) : nullptr, V::size);
        });
        const auto fetch_and_compute = [&](std::int64_t k, Whole, Mask<A> is_target, auto add) FL_INLINE {
            next_tile.fetch<2>(k);
            body(k, Whole{}, is_target, add);
        };
        for_each(part, fetch_and_compute, end_run);
    }

    const std::int64_t whole = p.num_classes;  // vectors of a part: all of them are full
    static constexpr int tail = 0;

private:
    FL_NOINLINE void read_tile(std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        with_stored<A>(p.dtype, [&]<class Stored>() {
            if (reads) Tile::template load_logits<Stored>(outer, first, n);
        });
    }

    FL_NOINLINE void write_tile(std::int64_t first, int n) {
        with_stored<A>(p.dtype, [&]<class Stored>() {
            const auto as_it_is = [](int) FL_INLINE { return [](V x, std::int64_t) FL_INLINE { return x; }; };
            Tile::template store_gradient<Stored>(outer, first, n, as_it_is);
        });
    }

    A* block_of(int part) const { return Tile::block(first_row + part * V::size); }

    void clear_ignored() const {
        for (int i = 0; i < row_count && rows.any_ignored; ++i)
            for (std::int64_t c = 0; c < p.num_classes && rows.ignored(first_row + i); ++c)
                block_of(i / V::size)[c * V::size + i % V::size] = A(0);
    }

    const int tile_rows, strip_rows;
    bool reads;
    int first_row, row_count;  // of the strip, in the tile
    std::int64_t outer, next;  // the row behind the strip
    PerGroup target;           // class numbers
};

}  // namespace FL_ISA
}  // namespace fused_losses
