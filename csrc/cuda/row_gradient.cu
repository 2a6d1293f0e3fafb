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

// kThreads threads per row: one, some lanes, a warp or the whole block.
template <class Stored, int kThreads, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    const TeamOf<kThreads> team;
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

template <class Stored, bool kSpread>
FL_DEVICE void staged_row(const RowArgs<acc_t<Stored>>& args, const Row& row, acc_t<Stored>* x) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const Target target = target_of(p, row);
    if (target.ignored) {
        for (int c = 0; c < classes; ++c) x[c] = A(0);
        return;
    }
    if (target.cls >= 0) x[target.cls] += bias_of(args);
    const Coefficients<A> coefficients = saved_coefficients<A>(p, row);
    const SpreadReader<Stored> spread(p, args, row);
    for (int c = 0; c < classes; ++c) x[c] = coefficients.at(x[c], kSpread ? spread(c) : A(0), c == target.cls);
}

template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient_staged(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    __shared__ acc_t<Stored> memory[StagedTile<Stored>::kSize];
    const RowProblem& p = args.problem;
    if (is_already_written<acc_t<Stored>>(p)) return;
    const StagedTile<Stored> tile(memory, static_cast<int>(p.num_classes));
    for_each_tile(p, [&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read(as<Stored>(p.logits) + first * p.num_classes, rows);
        __syncthreads();
        if (me < rows) staged_row<Stored, kSpread>(args, row_at(p, first + me), tile.row(me));
        __syncthreads();
        tile.write(static_cast<Stored*>(p.grad) + first * p.num_classes, rows);
    });
}

}  // namespace

cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        const RowArgs<acc_t<Stored>> args(p);
        switch (regime_of(p)) {
            case Regime::kStaged:
                if constexpr (!std::is_same_v<Stored, double>)
                    return launch(gradient_staged<Stored, kSpread>, blocks_for(p.rows(), kBlock), stream, args);
                break;
            case Regime::kThread:
                return launch(gradient<Stored, 1, kSpread>, blocks_for(p.rows(), kBlock), stream, args);
            case Regime::kLanes:
                if constexpr (!std::is_same_v<Stored, double>)
                    return launch(gradient<Stored, kLanes, kSpread>, blocks_for(p.rows(), kBlock / kLanes), stream,
                                  args);
                break;
            case Regime::kWarp:
                return launch(gradient<Stored, 32, kSpread>, blocks_for(p.rows(), kBlock / 32), stream, args);
            case Regime::kBlock:
                return launch(gradient<Stored, kBlock, kSpread>, blocks_for(p.rows(), 1), stream, args);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace fused_losses::cuda
