// Gradient of losses of several passes from the state that forward has saved.
#include "cuda/pass_row.cuh"

namespace fused_losses::cuda {
namespace {

template <class A, class State>
FL_DEVICE State saved_state(const RowProblem& p, std::int64_t row) {
    constexpr int count = kStateSize<State, A>;
    A numbers[count];
    for (int k = 0; k < count; ++k) numbers[k] = as<A>(p.stats)[k * p.rows() + row];
    State state;
    std::memcpy(&state, numbers, sizeof(state));
    return state;
}

template <class Stored, class Loss, class Team>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    using State = typename Loss::template State<A>;
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    const Team team(args.residence);
    const std::int64_t rows = p.rows(), step = team.count();
    for (std::int64_t number = team.number(); number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const RowSlice<Stored> whole = whole_row<Stored>(p, row);
        if (target.ignored) {  // for the whole group
            write_zeros(p, team, row, whole);
            continue;
        }
        const A scale = scale_of<A>(p, row) * class_weight_of<A>(p, target);
        write_pass_gradient<Loss>(args, team, whole, gradient_row<Stored>(p, row), p.grad_class_stride, target.cls,
                                  saved_state<A, State>(p, number), scale);
    }
}

template <class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<float>)
    gradient_staged(const __grid_constant__ RowArgs<float> args) {
    using State = typename Loss::template State<float>;
    __shared__ float memory[StagedTile::kSize];
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    const StagedTile tile(memory, p);
    tile.for_each([&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read_logits(first, rows);
        __syncthreads();
        if (me < rows) {
            const Row row = row_at(p, first + me);
            const Target target = target_of(p, row);
            float* const x = tile.row(me);
            if (target.ignored)
                for (int c = 0; c < p.num_classes; ++c) x[c] = 0;
            else
                write_pass_gradient<Loss>(args, Alone(), tile.slice(me), x, 1, target.cls,
                                          saved_state<float, State>(p, row.number),
                                          scale_of<float>(p, row) * class_weight_of<float>(p, target));
        }
        __syncthreads();
        tile.write_gradient(first, rows);
    });
}

template <class Given>
cudaError_t enqueue_gradient_of(const RowProblem& given, cudaStream_t stream) {
    return dispatch_pass<Given>(given, [&]<class Stored>(const RowProblem& p) {
        using Loss = typename RunAs<Given>::type;
        RowArgs<acc_t<Stored>> args(p);
        const Regime regime = regime_of(p);
        if constexpr (!kIsForChecking<Stored>) {
            if (regime == Regime::kStaged)
                return launch_over_rows(gradient_staged<Loss>, p.rows(), kBlock, stream, args);
            if (regime == Regime::kThread)
                return launch_over_rows(gradient<Stored, Loss, Alone>, p.rows(), kBlock, stream, args);
        }
        const int threads = args.residence.threads = threads_of(regime);
        return launch_over_rows(gradient<Stored, Loss, Group>, p.rows(), kBlock / threads, stream, args);
    });
}

}  // namespace

cudaError_t enqueue_pass_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    cudaError_t error = cudaErrorInvalidValue;
    visit_pass_loss(p.loss, [&]<class Loss>() { error = enqueue_gradient_of<Loss>(p, stream); });
    return error;
}

}  // namespace fused_losses::cuda
