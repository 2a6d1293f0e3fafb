// Forward of losses of several passes (core/pass_loss.h): each row's value, its share of the denominator and its state.
// Passes after the first find the row in cache.
#include "cuda/pass_row.cuh"

namespace fused_losses::cuda {
namespace {

template <class A, class State>
FL_DEVICE void write_row(const RowProblem& p, std::int64_t row, A value, A weight, const State& state) {
    if (p.row_values) static_cast<A*>(p.row_values)[row] = value;
    if (p.row_weights) static_cast<A*>(p.row_weights)[row] = weight;
    if (!p.stats) return;
    constexpr int count = kStateSize<State, A>;
    A numbers[count];
    std::memcpy(numbers, &state, sizeof(state));
    for (int k = 0; k < count; ++k) static_cast<A*>(p.stats)[k * p.rows() + row] = numbers[k];
}

template <class Stored, class Loss, int kThreads>
FL_DEVICE typename Loss::template State<acc_t<Stored>> run_passes(const RowArgs<acc_t<Stored>>& args,
                                                                  const Stored* logits, int target, int lane) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t stride = p.logits_class_stride;
    const A bias = bias_of(args);
    RowInputs<A> row{A(0), to_acc(logits[target * stride]) + bias, margin_of(args, target), A(classes)};
    // body(z, class) for the classes of this thread
    const auto each_class = [&](auto body) {
        walk<kThreads>(logits, classes, stride == 1, lane, [&]<int kCount>(Count<kCount>, int c) {
            A z[kCount];
            load(logits + c * stride, z);
#pragma unroll
            for (int k = 0; k < kCount; ++k) body(c + k == target ? row.target_logit : z[k], c + k);
        });
    };
    if constexpr (Loss::needs_max) {
        const auto larger = [](A a, A b) { return b > a ? b : a; };
        A top = -std::numeric_limits<A>::infinity();
        each_class([&](A z, int) { top = larger(top, z); });
        row.max = reduce_to_all<kThreads>(top, larger);
    }
    auto state = Loss::begin(row, args.params);
    const int passes = Loss::passes(p.params);
    for (int pass = 0; pass < passes; ++pass) {
        Sums<A, Loss::num_sums> sums{};
        each_class([&](A z, int cls) {
            const auto term = Loss::term(pass, state, z, margin_of(args, cls), cls == target, args.params);
#pragma unroll
            for (int i = 0; i < Loss::num_sums; ++i) sums.v[i] += term.v[i];
        });
#pragma unroll
        for (int i = 0; i < Loss::num_sums; ++i)
            sums.v[i] = reduce_to_all<kThreads>(sums.v[i], [](A a, A b) { return a + b; });
        Loss::end_pass(pass, state, sums, row, args.params);
    }
    return state;
}

template <class Stored, class Loss, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    forward(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    using State = typename Loss::template State<A>;
    const RowProblem& p = args.problem;
    constexpr int group_count = kBlock / kThreads;
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * group_count;
    for (std::int64_t number = std::int64_t(blockIdx.x) * group_count + group; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        if (target.ignored) {  // for the whole group
            if (lane == 0) write_row(p, number, A(0), A(0), State{});
            continue;
        }
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const State state = run_passes<Stored, Loss, kThreads>(args, logits, target.cls, lane);
        if (lane != 0) continue;
        const A value = Loss::value(state), weight = class_weight_of<A>(p, target) * sample_weight_of<A>(p, row);
        const bool counts = p.reduction != Reduction::kActiveMean || !(value <= A(0));  // NaN counts
        write_row(p, number, weight * value, counts ? weight : A(0), state);
    }
}

}  // namespace

cudaError_t enqueue_pass_forward(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch_pass(p, [&]<class Stored, class Loss, int kThreads>(const RowProblem& q) {
        return launch(forward<Stored, Loss, kThreads>, pass_blocks<kThreads>(q), stream, RowArgs<acc_t<Stored>>(q));
    });
}

}  // namespace fused_losses::cuda
