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

template <class Stored, class Loss, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    using State = typename Loss::template State<A>;
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    const TeamOf<kThreads> team;
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

template <class Stored, class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient_staged(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    using State = typename Loss::template State<A>;
    __shared__ A memory[StagedTile<Stored>::kSize];
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    const StagedTile<Stored> tile(memory, static_cast<int>(p.num_classes));
    for_each_tile(p, [&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read(as<Stored>(p.logits) + first * p.num_classes, rows);
        __syncthreads();
        if (me < rows) {
            const Row row = row_at(p, first + me);
            const Target target = target_of(p, row);
            A* const x = tile.row(me);
            if (target.ignored)
                for (int c = 0; c < p.num_classes; ++c) x[c] = A(0);
            else
                write_pass_gradient<Loss>(args, Alone{}, tile.slice(me), x, 1, target.cls,
                                          saved_state<A, State>(p, row.number),
                                          scale_of<A>(p, row) * class_weight_of<A>(p, target));
        }
        __syncthreads();
        tile.write(static_cast<Stored*>(p.grad) + first * p.num_classes, rows);
    });
}

}  // namespace

cudaError_t enqueue_pass_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch_pass(p, [&]<class Stored, class Loss, int kThreads>(const RowProblem& q) {
        const RowArgs<acc_t<Stored>> args(q);
        const unsigned blocks = blocks_for(q.rows(), kBlock / std::max(kThreads, 1));
        if constexpr (kThreads == 0)
            return launch(gradient_staged<Stored, Loss>, blocks, stream, args);
        else
            return launch(gradient<Stored, Loss, kThreads>, blocks, stream, args);
    });
}

}  // namespace fused_losses::cuda
