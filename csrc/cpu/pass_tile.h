// Losses of several passes (core/pass_loss.h) on blocks of rows or on rows, whichever the tiling says.
#pragma once

#include "cpu/pass_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A, class Loss>
class PassTile {
    using V = Vec<A>;
    using State = typename Loss::template State<V>;
    static constexpr int kStates = kStateSize<State, V>;
    static_assert(kStates <= kMaxState);

public:
    PassTile(const RowProblem& problem, const Tiling& tiling)
        : p(problem), passes(Loss::passes(problem.params)), view(problem, tiling.lanes) {
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
    }

    void forward(std::int64_t outer, std::int64_t first, int n, TileSums& sums) {
        each_view(outer, first, n, p.stats ? kStates : 0, [&](int at, int count) {
            const State state = run(at);
            view.finish(outer, first, at, count, Loss::value(state), sums);
            const auto numbers = std::bit_cast<std::array<V, kStates>>(state);
            if (p.stats) view.save(numbers.data(), kStates, outer * p.inner + first + at, count);
            if (p.grad) write_gradient(state, outer, first, at, count);
        });
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        each_view(outer, first, n, 0, [&](int at, int count) {
            std::array<V, kStates> numbers;
            view.restore(numbers.data(), kStates, outer * p.inner + first + at, count);
            write_gradient(std::bit_cast<State>(numbers), outer, first, at, count);
        });
    }

private:
    // Calls body(at, count) with the rows [at, at + count) of the tile loaded.
    template <class Body>
    void each_view(std::int64_t outer, std::int64_t first, int n, int states, Body body) {
        view.rows.begin(p, outer, first, n);
        const int step = view.lanes ? V::size : 1;
        for (int at = 0; at < n; at += step) {
            if (!view.lanes && view.rows.ignored(at)) {
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
        if constexpr (Loss::needs_max) row.max = find_max();
        State state = Loss::begin(row, params);
        for (int pass = 0; pass < passes; ++pass) {
            Sums<V, Loss::num_sums> sums;
            for (V& sum : sums.v) sum = A(0);
            for (std::int64_t k = 0; k < view.vectors; ++k) {
                const V z = V::load(view.x() + k * V::size);
                const auto term = Loss::term(pass, state, z, view.margin_at(k, row.margin), view.is_target(k), params);
                const auto is_class = view.is_class(k);
                for (int i = 0; i < Loss::num_sums; ++i) sums.v[i] += math::select(is_class, term.v[i], V(A(0)));
            }
            for (V& sum : sums.v) sum = view.total(sum);
            Loss::end_pass(pass, state, sums, row, params);
        }
        return state;
    }

    V find_max() const {
        const V least = -std::numeric_limits<A>::infinity();
        V top = least;
        for (std::int64_t k = 0; k < view.vectors; ++k)
            top = max(top, math::select(view.is_class(k), V::load(view.x() + k * V::size), least));
        return view.highest(top);
    }

    void write_gradient(const State& state, std::int64_t outer, std::int64_t first, int at, int count) {
        const V scale = view.per_row(view.rows.scale, at) * view.per_row(view.rows.class_weight, at);
        const V margin = view.margin_of(at);
        for (std::int64_t k = 0; k < view.vectors; ++k) {
            A* const x = view.x() + k * V::size;
            const V of_class = view.margin_at(k, margin);
            (scale * Loss::gradient(state, V::load(x), of_class, view.is_target(k), params)).store(x);
        }
        view.store_gradient(outer, first, at, count);
    }

    const RowProblem& p;
    const int passes;
    V params[kMaxParams];
    PassRows<A> view;
};

}  // namespace FL_ISA
}  // namespace fused_losses
