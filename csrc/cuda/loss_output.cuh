// The end of every forward: what is kept of each row, and the sums over all rows.
#pragma once

#include "cuda/grid.cuh"

namespace fused_losses::cuda {

// upstream / denominator of the gradient that forward writes. To the bit what upstream_over_denominator() is for a
// backward that finds them right.
template <class A>
FL_DEVICE A written_inverse_denominator(const RowProblem& p) {
    A denominator = static_cast<A>(p.assumed_denominator);
    if (denominator == A(0)) denominator = p.denominator ? *as<A>(p.denominator) : A(1);
    const A inverse = denominator == A(0) ? A(0) : A(1) / denominator;
    return static_cast<A>(p.assumed_upstream) * inverse;
}

// A row's weighted value and what backward needs of it. Zeros for rows that are ignored.
template <class A, int n>
FL_DEVICE void keep_row(const RowProblem& p, const Row& row, A value, const A (&kept)[n]) {
    if (p.row_values) static_cast<A*>(p.row_values)[row.number] = value;
    if (!p.stats) return;
    A* const stats = static_cast<A*>(p.stats) + as_new(row.number);  // most calls keep none: no addresses beforehand
#pragma unroll
    for (int k = 0; k < n; ++k)
        if (k < p.stats_count) stats[k * p.rows()] = kept[k];
}

// What was kept of it, as the loss's own struct of so many numbers.
template <class State, class A>
FL_DEVICE State saved_state(const RowProblem& p, std::int64_t row) {
    constexpr int count = sizeof(State) / sizeof(A);
    A numbers[count];
    for (int k = 0; k < count; ++k) numbers[k] = as<A>(p.stats)[k * p.rows() + row];
    State state;
    std::memcpy(&state, numbers, sizeof(state));
    return state;
}

// For all threads of the grid, with the sums over their rows.
template <class A>
FL_DEVICE void write_loss(const RowArgs<A>& args, LossSums sums) {
    const LossOutput& out = args.out;
    if (!out.loss || !sum_over_grid(sums, out)) return;
    const Reduction reduction = args.problem.reduction;
    if (reduction == Reduction::kActiveMean) sums.weight += kActiveGuard;
    if (out.denominator) *static_cast<A*>(out.denominator) = static_cast<A>(sums.weight);
    if (void* const upstream = args.problem.written_upstream)
        *static_cast<A*>(upstream) = static_cast<A>(args.problem.assumed_upstream);
    *static_cast<A*>(out.loss) =
        static_cast<A>(reduction == Reduction::kSum ? sums.value : mean_of(sums.value, sums.weight));
}

// Does `grad` hold what backward is asked for? An upstream gradient that nobody assumed is left for the next forward.
template <class A>
FL_DEVICE bool is_already_written(const RowProblem& p) {
    if (!p.grad_is_written) return false;
    // All are loaded before one is looked at.
    const A upstream = p.upstream ? *as<A>(p.upstream) : A(1),
            assumed = p.written_upstream ? *as<A>(p.written_upstream) : A(1),
            denominator = p.denominator ? *as<A>(p.denominator) : A(1);
    if (upstream != assumed) {
        if (p.next_upstream && blockIdx.x == 0 && threadIdx.x == 0) *p.next_upstream = static_cast<double>(upstream);
        return false;
    }
    // Without a denominator to compare it with, what was assumed cannot be wrong: no row is ignored.
    return p.assumed_denominator == 0 || !p.denominator || denominator == static_cast<A>(p.assumed_denominator);
}

}  // namespace fused_losses::cuda
