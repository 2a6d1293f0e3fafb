// Losses of several passes (core/pass_loss.h) on blocks of rows or on rows, whichever the tiling says.
#pragma once

#include "cpu/pass_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A, class Loss, bool lanes>
class PassTile {
    using V = Vec<A>;
    using State = typename Loss::template State<V>;
    using AllSums = Sums<V, Loss::num_sums>;
    static constexpr int kStates = kStateSize<State, V>;
    static_assert(kStates <= kMaxState);

public:
    explicit PassTile(const RowProblem& problem)
        : p(problem),
          passes(Loss::passes(problem.params)),
          view(problem),
          kept(problem.grad ? Loss::num_kept * view.vectors() : 0) {
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
    }

    void forward(std::int64_t outer, std::int64_t first, int n, TileSums& sums) {
        each_view(outer, first, n, p.stats ? kStates : 0, [&](int at, int count) {
            const State state = run(at);
            view.finish(outer, first, at, count, Loss::value(state), sums);
            const auto numbers = std::bit_cast<std::array<V, kStates>>(state);
            if (p.stats) view.save(numbers.data(), kStates, outer * p.inner + first + at, count);
            if (p.grad) write_gradient<true>(state, outer, first, at, count);
        });
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        each_view(outer, first, n, 0, [&](int at, int count) {
            std::array<V, kStates> numbers;
            view.restore(numbers.data(), kStates, outer * p.inner + first + at, count);
            write_gradient<false>(std::bit_cast<State>(numbers), outer, first, at, count);
        });
    }

private:
    // Calls body(at, count) with the rows [at, at + count) of the tile loaded.
    template <class Body>
    void each_view(std::int64_t outer, std::int64_t first, int n, int states, Body body) {
        view.rows.begin(p, outer, first, n);
        const int step = lanes ? V::size : 1;
        for (int at = 0; at < n; at += step) {
            if (!lanes && view.rows.ignored(at)) {
                view.skip(outer, first + at, states);
                continue;
            }
            const int count = std::min(step, n - at);
            view.load(outer, first, at, count);
            body(at, count);
        }
    }

    State run(int at) const {
        RowInputs<V> row{V(A(0)), view.per_row(view.rows.target_logit, at), view.margin_of(at), V(A(p.num_classes))};
        if constexpr (Loss::needs_max) row.max = view.find_max();
        State state = Loss::begin(row, params.data());
        for (int pass = 0; pass + 1 < passes; ++pass) add_up<false>(pass, state, row);
        add_up<true>(passes - 1, state, row);
        return state;
    }

    template <bool last>
    void add_up(int pass, State& state, const RowInputs<V>& row) const {
        const bool keeps = p.grad;
        const AllSums partial =
            keeps ? sum_classes<last, true>(pass, state, row) : sum_classes<last, false>(pass, state, row);
        AllSums sums;
        for (int i = 0; i < Loss::num_sums; ++i) sums.v[i] = view.total(partial.v[i]);
        Loss::end_pass(pass, state, sums, row, params.data());
    }

    // What a pass adds up. By value, and with sums of its own, is what the loop works with: no number that is kept there
    // can change it, so it stays in registers and what depends on it alone is computed once.
    template <bool last, bool keeps>
    AllSums sum_classes(int pass, const State state, const RowInputs<V> row) const {
        constexpr int used = last ? Loss::num_sums : Loss::num_early_sums;
        const std::array<V, kMaxParams> own = params;
        V sums[used];
        for (V& sum : sums) sum = A(0);
        view.for_each([&](std::int64_t k, Mask<A> is_target, auto add) FL_INLINE {
            if (pass == 0) view.prefetch(k);
            const V z = V::load(view.x() + k * V::size), margin = view.margin_at(k, row.margin);
            const auto term = Loss::template term_keeping<last>(pass, state, z, margin, is_target, own.data(),
                                                                keeps ? kept_of(k) : nullptr);
            for (int i = 0; i < used; ++i) sums[i] = add(sums[i], term.v[i]);
        });
        AllSums result;
        for (int i = 0; i < Loss::num_sums; ++i) result.v[i] = i < used ? sums[i] : V(A(0));
        return result;
    }

    V* kept_of(std::int64_t k) const { return kept.data() + k * Loss::num_kept; }

    template <bool of_kept>
    void write_gradient(const State state, std::int64_t outer, std::int64_t first, int at, int count) {
        const V scale = view.per_row(view.rows.scale, at) * view.per_row(view.rows.class_weight, at);
        const V margin = view.margin_of(at);
        const std::array<V, kMaxParams> own = params;
        view.for_each([&](std::int64_t k, Mask<A> is_target, auto) FL_INLINE {
            A* const x = view.x() + k * V::size;
            V g;
            if constexpr (of_kept)
                g = Loss::gradient_of_kept(state, kept_of(k), is_target, own.data());
            else
                g = Loss::gradient(state, V::load(x), view.margin_at(k, margin), is_target, own.data());
            (scale * g).store(x);
        });
        view.store_gradient(outer, first, at, count);
    }

    const RowProblem& p;
    const int passes;
    std::array<V, kMaxParams> params;
    PassRows<A, lanes> view;
    Scratch<V> kept;  // per vector of the view
};

}  // namespace FL_ISA
}  // namespace fused_losses
