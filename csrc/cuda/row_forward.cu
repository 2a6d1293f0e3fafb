// Forward of row losses: one read of the logits gives each row's value, its share of the denominator and its
// stats.
#include "cuda/launch.cuh"
#include "cuda/softmax_state.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {
namespace {

template <class A>
FL_DEVICE void write_row(const RowProblem& p, const Row& row, A value, A weight, A max, A sum,
                         const AffineRow<A>& affine) {
    if (p.row_values) static_cast<A*>(p.row_values)[row.number] = value;
    if (p.row_weights) static_cast<A*>(p.row_weights)[row.number] = weight;
    if (!p.stats) return;
    const std::int64_t rows = p.rows();
    A* stats = static_cast<A*>(p.stats) + row.number;
    stats[0] = max;
    stats[rows] = affine.alpha / sum;
    stats[2 * rows] = affine.beta;
    if (p.spread != Spread::kNone) stats[3 * rows] = affine.gamma;
}

template <class A>
FL_DEVICE void write_ignored(const RowProblem& p, const Row& row) {
    write_row(p, row, A(0), A(0), A(0), A(1), AffineRow<A>{A(0), A(0), A(0), A(0)});
}

// The loss is a uniform branch: kernels are compiled once per dtype, not once per loss.
template <class A>
FL_DEVICE AffineRow<A> evaluate(const RowArgs<A>& args, const SoftmaxRow<A>& row) {
    if (args.problem.spread == Spread::kSoftTarget) return SoftCrossEntropy::eval(row, args.params);
    AffineRow<A> affine{};
    visit_loss(SoftmaxLosses{}, args.problem.loss, [&]<class Loss>() { affine = Loss::eval(row, args.params); });
    return affine;
}

// What one thread of a row does once the sums over its classes are known.
template <class A, bool kSpread>
FL_DEVICE void finish_row(const RowArgs<A>& args, const Row& row, const Target& target, A target_logit,
                          const SoftmaxState<A, kSpread>& state) {
    const RowProblem& p = args.problem;
    const A log_sum = math::log(state.sum);
    SoftmaxRow<A> softmax;
    softmax.log_p = (target_logit - state.max) - log_sum;
    softmax.sum_neg_log_p = kSpread ? state.sum_u * log_sum - state.centred : A(0);
    softmax.sum_u = kSpread ? state.sum_u : A(0);
    softmax.class_weight = class_weight_of<A>(p, target);
    softmax.num_classes = A(p.num_classes);
    const AffineRow<A> affine = evaluate(args, softmax);
    const A sample_weight = sample_weight_of<A>(p, row);
    write_row(p, row, sample_weight * affine.value, softmax.class_weight * sample_weight, state.max, state.sum, affine);
}

// kThreads threads per row: a warp or the whole block.
template <class Stored, int kThreads, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    forward_by_group(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    constexpr int group_count = kBlock / kThreads;
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t class_stride = p.logits_class_stride, rows = p.rows();
    const A bias = bias_of(args);
    const std::int64_t step = std::int64_t(gridDim.x) * group_count;
    for (std::int64_t number = std::int64_t(blockIdx.x) * group_count + group; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        if (target.ignored) {  // for the whole group
            if (lane == 0) write_ignored<A>(p, row);
            continue;
        }
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const A target_logit = target.cls < 0 ? A(0) : to_acc(logits[target.cls * class_stride]) + bias;
        const SpreadReader<Stored> spread(p, args, row);
        auto state = SoftmaxState<A, kSpread>::empty();
        walk_classes<kThreads>(logits, classes, class_stride == 1, lane, [&]<int kCount>(Count<kCount>, int c) {
            A z[kCount], u[kCount];
            load(logits + c * class_stride, z);
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                if (c + k == target.cls) z[k] += bias;
                u[k] = kSpread ? spread(c + k) : A(0);
            }
            state.push(z, u);
        });
        reduce_group<kThreads>(state);
        if (lane == 0) finish_row(args, row, target, target_logit, state);
    }
}

// One thread per row: few classes, or pixels of which neighbouring threads read neighbours.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    forward_by_thread(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t class_stride = p.logits_class_stride, rows = p.rows();
    const A bias = bias_of(args);
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock;
    for (std::int64_t number = std::int64_t(blockIdx.x) * kBlock + threadIdx.x; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        if (target.ignored) {
            write_ignored<A>(p, row);
            continue;
        }
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const A target_logit = target.cls < 0 ? A(0) : to_acc(logits[target.cls * class_stride]) + bias;
        const SpreadReader<Stored> spread(p, args, row);
        auto state = SoftmaxState<A, kSpread>::empty();
        for (int c = 0; c < classes; c += kClassesAtOnce) {
            A z[kClassesAtOnce], u[kClassesAtOnce];
#pragma unroll
            for (int k = 0; k < kClassesAtOnce; ++k) {  // beyond the last class: masked, of weight zero
                const bool valid = c + k < classes;
                z[k] = valid ? to_acc(logits[(c + k) * class_stride]) : -std::numeric_limits<A>::infinity();
                if (c + k == target.cls) z[k] += bias;
                u[k] = kSpread && valid ? spread(c + k) : A(0);
            }
            state.push(z, u);
        }
        finish_row(args, row, target, target_logit, state);
    }
}

}  // namespace

cudaError_t enqueue_forward(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        const RowArgs<acc_t<Stored>> args(p);
        switch (regime_of(p)) {
            case Regime::kThread:
                return launch(forward_by_thread<Stored, kSpread>, blocks_for(p.rows(), kBlock), stream, args);
            case Regime::kWarp:
                return launch(forward_by_group<Stored, 32, kSpread>, blocks_for(p.rows(), kBlock / 32), stream, args);
            case Regime::kBlock:
                return launch(forward_by_group<Stored, kBlock, kSpread>, blocks_for(p.rows(), 1), stream, args);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace fused_losses::cuda
