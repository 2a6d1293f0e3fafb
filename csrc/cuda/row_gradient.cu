// Gradient of softmax losses from what forward has saved of each row.
#include "cuda/loss_output.cuh"
#include "cuda/row_gradient.cuh"
#include "cuda/staged_tile.cuh"

namespace fused_losses::cuda {
namespace {

// The row's coefficients, multiplied by upstream * sample_weight / denominator.
template <class A>
FL_DEVICE Coefficients<A> saved_coefficients(const RowProblem& p, const Row& row) {
    const std::int64_t rows = p.rows();
    const A* stats = as<A>(p.stats) + row.number;
    Coefficients<A> coefficients{stats[0], stats[rows], stats[2 * rows],
                                 p.spread != Spread::kNone ? stats[3 * rows] : A(0)};
    coefficients.scale(scale_of<A>(p, row));
    return coefficients;
}

// A row for one thread, or for some lanes, a warp or a block.
template <class Stored, class Team, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    const Team team(args.residence);
    const std::int64_t rows = p.rows(), step = team.count();
    for (std::int64_t number = team.number(); number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const RowSlice<Stored> whole = whole_row<Stored>(p, row);
        if (target.ignored)  // for the whole group
            write_zeros(p, team, row, whole);
        else
            write_gradient<kSpread>(args, team, row, whole, target.cls, saved_coefficients<A>(p, row));
    }
}

template <bool kSpread>
FL_DEVICE void staged_row(const RowArgs<float>& args, const Row& row, float* x) {
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const Target target = target_of(p, row);
    if (target.ignored) {
        for (int c = 0; c < classes; ++c) x[c] = 0;
        return;
    }
    if (target.cls >= 0) x[target.cls] += bias_of(args);
    const Coefficients<float> coefficients = saved_coefficients<float>(p, row);
    const SpreadReader<float> spread(p, args, row);
    for (int c = 0; c < classes; ++c) x[c] = coefficients.at(x[c], kSpread ? spread(c) : 0.0f, c == target.cls);
}

template <bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<float>)
    gradient_staged(const __grid_constant__ RowArgs<float> args) {
    __shared__ float memory[StagedTile::kSize];
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    const StagedTile tile(memory, p);
    tile.for_each([&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read_logits(first, rows);
        __syncthreads();
        if (me < rows) staged_row<kSpread>(args, row_at(p, first + me), tile.row(me));
        __syncthreads();
        tile.write_gradient(first, rows);
    });
}

}  // namespace

cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        RowArgs<acc_t<Stored>> args(p);
        const Regime regime = regime_of(p);
        if constexpr (!kIsForChecking<Stored>) {
            if (regime == Regime::kStaged)
                return launch_over_rows(gradient_staged<kSpread>, p.rows(), kBlock, stream, args);
            if (regime == Regime::kThread)
                return launch_over_rows(gradient<Stored, Alone, kSpread>, p.rows(), kBlock, stream, args);
        }
        const int threads = args.residence.threads = threads_of(regime, false);
        return launch_over_rows(gradient<Stored, Group, kSpread>, p.rows(), kBlock / threads, stream, args);
    });
}

}  // namespace fused_losses::cuda
