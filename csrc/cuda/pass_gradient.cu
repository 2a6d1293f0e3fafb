// Gradient of losses of several passes from the state that forward has saved.
#include "cuda/pass_row.cuh"

namespace fused_losses::cuda {
namespace {

template <class A>
FL_DEVICE A scale_of(const RowProblem& p, const Row& row, const Target& target) {
    const A denominator = p.denominator ? *as<A>(p.denominator) : A(1);
    const A share = denominator == A(0) ? A(0) : A(1) / denominator;
    const A upstream = p.upstream ? as<A>(p.upstream)[p.upstream_stride.at(row.outer, row.inner)] : A(1);
    return upstream * sample_weight_of<A>(p, row) * share * class_weight_of<A>(p, target);
}

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
    constexpr int group_count = kBlock / kThreads;
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t from_stride = p.logits_class_stride, to_stride = p.grad_class_stride;
    const A bias = bias_of(args);
    const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * group_count;
    for (std::int64_t number = std::int64_t(blockIdx.x) * group_count + group; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        Stored* grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
        const bool contiguous = from_stride == 1 && to_stride == 1;
        const bool vectors = contiguous && misalignment(logits) == misalignment(grad);
        const A scale = target.ignored ? A(0) : scale_of<A>(p, row, target);
        const State state = saved_state<A, State>(p, number);
        walk<kThreads>(logits, classes, vectors, lane, [&]<int kCount>(Count<kCount>, int c) {
            A z[kCount] = {};
            if (!target.ignored) {  // their logits are not read, they may be NaN
                load(logits + c * from_stride, z);
#pragma unroll
                for (int k = 0; k < kCount; ++k) {
                    const bool own = c + k == target.cls;
                    const A biased = own ? z[k] + bias : z[k];
                    z[k] = scale * Loss::gradient(state, biased, margin_of(args, c + k), own, args.params);
                }
            }
            store(grad + c * to_stride, z);
        });
    }
}

}  // namespace

cudaError_t enqueue_pass_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch_pass(p, [&]<class Stored, class Loss, int kThreads>(const RowProblem& q) {
        return launch(gradient<Stored, Loss, kThreads>, pass_blocks<kThreads>(q), stream, RowArgs<acc_t<Stored>>(q));
    });
}

}  // namespace fused_losses::cuda
