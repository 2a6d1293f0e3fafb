// Forward of losses of several passes (core/pass_loss.h): each row's value, its share of the denominator and its state,
// the sums over all rows, on demand the gradient. Passes after the first find the row in cache or shared memory.
#include "cuda/pass_row.cuh"

namespace fused_losses::cuda {
namespace {

// Of one class row: logits with `stride` between classes.
template <class Stored, class Loss, int kThreads>
FL_DEVICE typename Loss::template State<acc_t<Stored>> run_passes(const RowArgs<acc_t<Stored>>& args,
                                                                  const Stored* logits, std::int64_t stride, int target,
                                                                  int lane) {
    using A = acc_t<Stored>;
    const int classes = static_cast<int>(args.problem.num_classes);
    RowInputs<A> row{A(0), to_acc(logits[target * stride]) + bias_of(args), margin_of(args, target), A(classes)};
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
    const int passes = Loss::passes(args.problem.params);
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

// What comes out of the rows.
template <class A, class Loss>
struct RowEnd {
    using State = typename Loss::template State<A>;

    const RowArgs<A>& args;
    const A share;  // 1 / denominator of the gradient that forward writes
    LossSums sums{0, 0};

    FL_DEVICE explicit RowEnd(const RowArgs<A>& a) : args(a), share(written_share<A>(a.problem)) {}

    FL_DEVICE void record(const Row& row, A value, A weight, const State& state) {
        const RowProblem& p = args.problem;
        sums.add({static_cast<double>(value), static_cast<double>(weight)});
        if (p.row_values) static_cast<A*>(p.row_values)[row.number] = value;
        if (!p.stats) return;
        constexpr int count = kStateSize<State, A>;
        A numbers[count];
        std::memcpy(numbers, &state, sizeof(state));
        for (int k = 0; k < count; ++k) static_cast<A*>(p.stats)[k * p.rows() + row.number] = numbers[k];
    }

    // Returns what the row's gradient is multiplied by.
    FL_DEVICE A finish(const Row& row, const Target& target, const State& state, bool records) {
        const RowProblem& p = args.problem;
        const A value = Loss::value(state), weight = class_weight_of<A>(p, target) * sample_weight_of<A>(p, row);
        const bool counts = p.reduction != Reduction::kActiveMean || !(value <= A(0));  // NaN counts
        if (records) record(row, weight * value, counts ? weight : A(0), state);
        return weight * share;
    }
};

template <class Stored, class Loss, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, Loss::needs_max>)
    forward(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    constexpr int group_count = kBlock / kThreads;
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    RowEnd<A, Loss> end(args);
    const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * group_count;
    for (std::int64_t number = std::int64_t(blockIdx.x) * group_count + group; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        if (target.ignored) {  // for the whole group
            if (lane == 0) end.record(row, A(0), A(0), {});
            if (p.grad) write_zeros<kThreads, Stored>(p, row, lane);
            continue;
        }
        const Stored* const logits = logits_of<Stored>(p, row);
        const auto state = run_passes<Stored, Loss, kThreads>(args, logits, p.logits_class_stride, target.cls, lane);
        const A scale = end.finish(row, target, state, lane == 0);
        if (p.grad)
            write_pass_gradient<Stored, Loss, kThreads>(args, logits, p.logits_class_stride,
                                                        gradient_row<Stored>(p, row), p.grad_class_stride, target.cls,
                                                        state, scale, lane);
    }
    write_loss(args, end.sums);
}

template <class Stored, class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, Loss::needs_max>)
    forward_staged(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    __shared__ A memory[StagedTile<Stored>::kSize];
    const RowProblem& p = args.problem;
    const StagedTile<Stored> tile(memory, static_cast<int>(p.num_classes));
    RowEnd<A, Loss> end(args);
    for_each_tile(p, [&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read(as<Stored>(p.logits) + first * p.num_classes, rows);
        __syncthreads();
        if (me < rows) {
            const Row row = row_at(p, first + me);
            const Target target = target_of(p, row);
            A* const x = tile.row(me);
            if (target.ignored) {
                end.record(row, A(0), A(0), {});
                for (int c = 0; c < p.num_classes; ++c) x[c] = A(0);
            } else {
                const auto state = run_passes<A, Loss, 1>(args, x, 1, target.cls, 0);
                const A scale = end.finish(row, target, state, true);
                if (p.grad) write_pass_gradient<A, Loss, 1>(args, x, 1, x, 1, target.cls, state, scale, 0);
            }
        }
        if (!p.grad) return;
        __syncthreads();
        tile.write(static_cast<Stored*>(p.grad) + first * p.num_classes, rows);
    });
    write_loss(args, end.sums);
}

}  // namespace

cudaError_t enqueue_pass_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.rows() == 0 && !out.loss) return cudaSuccess;
    return dispatch_pass(p, [&]<class Stored, class Loss, int kThreads>(const RowProblem& q, unsigned blocks) {
        const RowArgs<acc_t<Stored>> args(q, out);
        if constexpr (kThreads == 0)
            return launch(forward_staged<Stored, Loss>, blocks, stream, args);
        else
            return launch(forward<Stored, Loss, kThreads>, blocks, stream, args);
    });
}

}  // namespace fused_losses::cuda
