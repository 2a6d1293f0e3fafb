// Gradient of softmax losses from what forward has saved of each row.
#include "cuda/register_launch.cuh"
#include "cuda/row_end.cuh"

namespace fused_losses::cuda {
namespace {

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

}  // namespace

cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        RowArgs<acc_t<Stored>> args(p);
        const Regime regime = regime_of(p);
        if constexpr (!kIsForChecking<Stored>) {
            if (cudaError_t error; enqueue_if_held<Stored, kSpread>(p, {}, true, stream, error)) return error;
            if (regime == Regime::kThread)
                return launch_over_rows(gradient<Stored, Alone, kSpread>, p.rows(), kBlock, stream, args);
        }
        const int threads = args.residence.threads = threads_of(regime);
        return launch_over_rows(gradient<Stored, Group, kSpread>, p.rows(), kBlock / threads, stream, args);
    });
}

}  // namespace fused_losses::cuda
