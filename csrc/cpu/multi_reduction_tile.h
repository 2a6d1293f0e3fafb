// Multi-reduction losses (core/multi_reduction_loss.h) on a tile, vertical or horizontal.
#pragma once

#include "cpu/horizontal_view.h"
#include "cpu/vertical_view.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A, class Loss, bool vertical>
class MultiReductionTile {
    using V = Vec<A>;
    using View = std::conditional_t<vertical, VerticalView<A>, HorizontalView<A>>;
    using State = typename Loss::template State<V>;
    using States = std::array<State, View::kGroups>;
    using Inputs = std::array<RowInputs<V>, View::kGroups>;
    using AllSums = Sums<V, Loss::num_sums>;
    static constexpr int kStates = kStateSize<State, V>;
    static_assert(kStates <= kMaxState);

public:
    MultiReductionTile(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          passes(passes_of<Loss>(problem.params)),
          view(problem, tile_rows),
          kept(problem.grad || problem.bits ? view.parts() * view.vectors() * Loss::num_kept : 0) {
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
    }

    void forward(std::int64_t outer, std::int64_t first, int n, LossSums& sums) {
        view.for_strips(outer, first, n, /*with_logits=*/true, [&](std::int64_t row) {
            const States states = run();
            view.for_groups([&](int group, int at, int count) {
                const std::int64_t from = row + group * V::size;
                view.rows.weigh_and_add(p, at, count, from, Loss::value(states[group]), sums);
                const auto numbers = std::bit_cast<std::array<V, kStates>>(states[group]);
                if (p.stats) view.rows.save(p, at, count, from, numbers.data(), kStates);
            });
            if (p.grad) write_gradient<Source::kKept>(states);
        });
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        const bool from_bits = has_bits && p.bits;
        view.for_strips(outer, first, n, /*with_logits=*/!from_bits, [&](std::int64_t row) {
            States states;
            view.for_groups([&](int group, int, int count) {
                std::array<V, kStates> numbers;
                view.rows.restore(p, count, row + group * V::size, numbers.data(), kStates);
                states[group] = std::bit_cast<State>(numbers);
            });
            if constexpr (has_bits)
                if (from_bits) return write_gradient<Source::kBits>(states);
            write_gradient<Source::kLogits>(states);
        });
    }

private:
    static constexpr bool has_bits = kHasBits<Loss>;   // of RowProblem
    enum class Source { kLogits, kKept, kBits };       // of a gradient
    enum class Early { kFromLogits, kToKeep, kKept };  // where the inputs of early passes come from

    States run() {
        const V classes = A(p.num_classes);
        typename View::PerGroup top = {};
        if constexpr (Loss::needs_max) top = view.find_max();
        States states{};  // GCC 12 cannot see that every group is filled
        Inputs rows{};
        view.for_groups([&](int group, int at, int) {
            rows[group] = {top[group], V::load(view.rows.target_logit + at), view.rows.margins(p, at), classes};
            states[group] = Loss::begin(rows[group], params.data());
        });
        for (int pass = 0; pass < passes; ++pass)
            pass + 1 == passes ? run_pass<true>(pass, states, rows) : run_pass<false>(pass, states, rows);
        return states;
    }

    template <bool last>
    void run_pass(int pass, States& states, const Inputs& rows) {
        std::array<AllSums, View::kGroups> sums;
        for (AllSums& of_group : sums)
            for (V& sum : of_group.v) sum = A(0);
        view.for_parts([&](int part) {
            const int group = View::group_of(part);
            const State state = in_part(states[group], part);
            const bool keeps = p.grad || p.bits;
            AllSums partial{};
            if constexpr (kAddsReciprocals<Loss> && !last)
                partial.v[0] = !keeps      ? sum_reciprocals<Early::kFromLogits>(part, state)
                               : pass == 0 ? sum_reciprocals<Early::kToKeep>(part, state)
                                           : sum_reciprocals<Early::kKept>(part, state);
            else
                partial = keeps ? sum_classes<last, true>(pass, part, state, rows[group])
                                : sum_classes<last, false>(pass, part, state, rows[group]);
            for (int i = 0; i < Loss::num_sums; ++i) view.put_total(sums[group].v[i], part, partial.v[i]);
        });
        view.for_groups(
            [&](int group, int, int) { Loss::finalize(pass, states[group], sums[group], rows[group], params.data()); });
    }

    static State in_part(const State& state, int part) {
        auto numbers = std::bit_cast<std::array<V, kStates>>(state);
        for (V& number : numbers) number = View::in_part(number, part);
        return std::bit_cast<State>(numbers);
    }

    // What a pass adds up in one part. The state is taken by value and the sums are local variables. The compiler then
    // knows that writing to the room for kept numbers changes neither: they stay in registers, and what depends on the
    // state alone is computed once, before the loop.
    template <bool last, bool keeps>
    AllSums sum_classes(int pass, int part, const State state, const RowInputs<V>& row) {
        constexpr int used = last ? Loss::num_sums : Loss::num_early_sums;
        const std::array<V, kMaxParams> local_params = params;
        const auto margins = class_margins(view.in_part(row.margin, part));
        const A* const logits = view.logits(part);
        V sums[used], runs[used];  // of this run of vectors, of those before
        unrolled<used>([&](auto i) FL_INLINE { sums[i] = runs[i] = A(0); });
        V* const room = keeps ? kept_of(part) : nullptr;
        if (keeps && !room) __builtin_unreachable();  // the loop need not ask
        constexpr bool makes_bits = has_bits && last && keeps;
        VectorBits<A>* const bits = makes_bits ? bits_of(part) : nullptr;
        const auto add_class = [&](std::int64_t k, auto count, Mask<A> is_target, auto add) FL_INLINE {
            const V z = load_n_or(logits + k * V::size, count, A(0));
            const auto term =
                Loss::template map<last>(pass, state, z, margins.at(k, count), is_target, local_params.data(),
                                         keeps ? room + k * Loss::num_kept : nullptr);
            unrolled<used>([&](auto i) FL_INLINE { sums[i] = add(sums[i], term.v[i]); });
            if constexpr (makes_bits)
                if (bits) bits[k] = nonzero_bits(Loss::bit(term));
        };
        const auto end_run = [&]() FL_INLINE {
            unrolled<used>([&](auto i) FL_INLINE { runs[i] += sums[i], sums[i] = A(0); });
        };
        if (last)
            view.for_each_fetching(part, add_class, end_run);
        else
            view.for_each(part, add_class, end_run);
        AllSums result{};
        unrolled<used>([&](auto i) FL_INLINE { result.v[i] = runs[i] + sums[i]; });
        return result;
    }

    // The same for an early pass whose terms are reciprocals. Two share a division: 1/a + 1/b = (a + b) / (a b).
    template <Early inputs>
    V sum_reciprocals(int part, const State state) const {
        const std::array<V, kMaxParams> local_params = params;
        const A* const logits = view.logits(part);
        V* const room = kept_of(part);
        const auto denominator = [&](std::int64_t k, auto count) FL_INLINE {
            V input;
            if constexpr (inputs == Early::kKept)
                input = room[k * Loss::num_kept];
            else
                input = Loss::early_input(state, load_n_or(logits + k * V::size, count, A(0)));
            if constexpr (inputs == Early::kToKeep) room[k * Loss::num_kept] = input;
            return Loss::denominator(state, input, local_params.data());
        };
        const std::int64_t pairs = view.whole / 2;
        V total = A(0);
        for_runs(pairs, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) FL_INLINE {
            V sum = A(0);
            for (std::int64_t pair = begin; pair < end; ++pair) {
                const V a = denominator(2 * pair, Whole{}), b = denominator(2 * pair + 1, Whole{});
                sum += (a + b) * math::reciprocal(a * b);
            }
            total += sum;
        });
        if (view.whole % 2) total += math::reciprocal(denominator(2 * pairs, Whole{}));
        if (view.tail == 0) return total;
        const Mask<A> is_class = first_n<A>(view.tail);
        return total + math::select(is_class, math::reciprocal(denominator(view.whole, view.tail)), V(A(0)));
    }

    typename View::ClassMargins class_margins(V of_row) const {
        return {as<A>(p.first_param), p.first_param_stride, of_row};
    }

    // Where the part's bits are kept; null if the problem asks for none.
    VectorBits<A>* bits_of(int part) const {
        return p.bits ? static_cast<VectorBits<A>*>(p.bits) + view.first_bit_vector(part) : nullptr;
    }

    V* kept_of(int part) const { return kept.data() + part * view.vectors() * Loss::num_kept; }

    template <Source source>
    void write_gradient(const States& states) {
        typename View::PerGroup scale, margin;
        view.for_groups([&](int group, int at, int) {
            scale[group] = V::load(view.rows.scale + at) * V::load(view.rows.class_weight + at);
            margin[group] = view.rows.margins(p, at);
        });
        view.for_parts([&](int part) {
            const int group = View::group_of(part);
            write_part<source>(part, in_part(states[group], part), view.in_part(scale[group], part),
                               view.in_part(margin[group], part));
        });
    }

    template <Source source>
    void write_part(int part, const State state, V scale, V row_margin) {
        const std::array<V, kMaxParams> local_params = params;
        const auto margins = class_margins(row_margin);
        const A* const logits = view.logits(part);
        A* const gradient = view.gradient(part);
        const V* const room = kept_of(part);
        const VectorBits<A>* const bits = bits_of(part);
        const auto write = [&](std::int64_t k, auto count, Mask<A> is_target, auto) FL_INLINE {
            V g;
            if constexpr (source == Source::kBits)
                g = Loss::gradient_of_bit(state, from_bits<A>(bits[k]), is_target);
            else if constexpr (source == Source::kKept)
                g = Loss::gradient(state, room + k * Loss::num_kept, is_target, local_params.data());
            else
                g = gradient_at<Loss>(state, load_n_or(logits + k * V::size, count, A(0)), margins.at(k, count),
                                      is_target, local_params.data());
            store_n(gradient + k * V::size, scale * g, count);
        };
        if constexpr (source == Source::kKept)
            view.for_each(part, write);
        else
            view.for_each_fetching(part, write);
    }

    const RowProblem& p;
    const int passes;
    std::array<V, kMaxParams> params;
    View view;
    Scratch<V> kept;  // per vector of the view
};

}  // namespace FL_ISA
}  // namespace fused_losses
