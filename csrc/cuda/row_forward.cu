// Forward of softmax losses: one read of the logits gives each row's value, its share of the denominator and its stats,
// and the sums over all rows; on demand the gradient, for which the row is found in shared memory or in cache.
#include "cuda/grid.cuh"
#include "cuda/loss_output.cuh"
#include "cuda/pixel_tile.cuh"
#include "cuda/residence.cuh"
#include "cuda/row_gradient.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/staged_tile.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {
namespace {

// The loss is a uniform branch, once a row: kernels are compiled once per dtype, not once per loss.
template <bool kSpread, class A>
FL_DEVICE AffineRow<A> evaluate(const RowProblem& p, const A* params, const SoftmaxRow<A>& row) {
    if constexpr (kSpread)
        if (p.spread == Spread::kSoftTarget) return SoftCrossEntropy::eval(row, params);
    AffineRow<A> affine{};
    visit_loss(SoftmaxLosses{}, p.loss, [&]<class Loss>() {
        if constexpr (kIsForChecking<A> || may_have_spread<Loss, kSpread>()) affine = Loss::eval(row, params);
    });
    return affine;
}

template <class A>
FL_DEVICE void write_stats(const RowProblem& p, const Row& row, const Coefficients<A>& c) {
    if (!p.stats) return;
    const std::int64_t rows = p.rows();
    A* stats = static_cast<A*>(p.stats) + row.number;
    stats[0] = c.max;
    stats[rows] = c.alpha;
    stats[2 * rows] = c.beta;
    if (p.spread != Spread::kNone) stats[3 * rows] = c.gamma;
}

// What forward knows of its row, and what comes out of it.
template <class A>
struct RowEnd {
    const RowArgs<A>& args;
    const A share;  // 1 / denominator of the gradient that forward writes
    LossSums sums{0, 0};

    FL_DEVICE explicit RowEnd(const RowArgs<A>& a) : args(a), share(written_share<A>(a.problem)) {}

    FL_DEVICE void ignore(const Row& row, bool records) {
        if (!records) return;
        if (args.problem.row_values) static_cast<A*>(args.problem.row_values)[row.number] = A(0);
        write_stats(args.problem, row, Coefficients<A>{A(0), A(0), A(0), A(0)});
    }

    // From the sums over the classes to the gradient's coefficients, which every thread of the row gets; one `records`.
    template <bool kSpread>
    FL_DEVICE Coefficients<A> finish(const Row& row, const Target& target, A target_logit,
                                     const SoftmaxState<A, kSpread>& state, bool records) {
        const RowProblem& p = args.problem;
        const A log_sum = math::log(state.sum);
        SoftmaxRow<A> softmax;
        softmax.log_p = (target_logit - state.max) - log_sum;
        softmax.sum_neg_log_p = kSpread ? state.sum_u * log_sum - state.centred : A(0);
        softmax.sum_u = kSpread ? state.sum_u : A(0);
        softmax.class_weight = class_weight_of<A>(p, target);
        softmax.num_classes = A(p.num_classes);
        const AffineRow<A> affine = evaluate<kSpread>(p, args.params, softmax);
        const A sample_weight = sample_weight_of<A>(p, row);
        Coefficients<A> coefficients{state.max, affine.alpha / state.sum, affine.beta, affine.gamma};
        if (records) {
            const A value = sample_weight * affine.value;
            if (p.row_values) static_cast<A*>(p.row_values)[row.number] = value;
            write_stats(p, row, coefficients);
            sums.add({static_cast<double>(value), static_cast<double>(softmax.class_weight * sample_weight)});
        }
        coefficients.scale(sample_weight * share);
        return coefficients;
    }
};

// A row for some lanes, a warp, or the blocks of a cluster.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, kSpread>)
    forward_by_group(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    Group team(args.residence);
    RowEnd<A> end(args);
    RowReader<Stored, Group>(args, team)
        .for_each([&](const Row& row, const Target& target, const RowSlice<Stored>& slice, bool exists) {
            // Lanes of an ignored row take part in the shuffles of their warp.
            const A bias = bias_of(args);
            const bool has_target_logit = target.cls >= 0 && !target.ignored;
            const A target_logit = has_target_logit ? logit_of(p, row, slice, target.cls) + bias : A(0);
            const SpreadReader<A> spread(p, args, row);
            auto state = SoftmaxState<A, kSpread>::empty();
            const int classes = target.ignored ? 0 : slice.count;
            team.walk(slice.logits, classes, slice.stride == 1, [&]<int kCount>(Count<kCount>, int c) {
                A z[kCount], u[kCount];
                load(slice.logits + c * slice.stride, z);
#pragma unroll
                for (int k = 0; k < kCount; ++k) {
                    const int cls = slice.first + c + k;
                    if (cls == target.cls) z[k] += bias;
                    u[k] = kSpread ? spread(cls) : A(0);
                }
                state.push(z, u);
            });
            reduce_team(team, state);
            if (!exists) return;
            if (target.ignored) {
                end.ignore(row, team.records());
                if (p.grad) write_zeros(p, team, row, slice);
                return;
            }
            const auto coefficients = end.finish(row, target, target_logit, state, team.records());
            if (p.grad) write_gradient<kSpread>(args, team, row, slice, target.cls, coefficients);
        });
    team.part_company();
    write_loss(args, end.sums);
}

// One thread per row, or a few: pixels of which neighbouring threads read neighbours, or few classes.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, kSpread>)
    forward_by_thread(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    RowEnd<A> end(args);
    PixelTiles<Stored>(args).for_each(
        [&](const Column& column, const Row& row, const Target& target, const RowSlice<Stored>& slice, bool exists) {
            const A bias = bias_of(args);
            const SpreadReader<A> spread(p, args, row);
            auto state = SoftmaxState<A, kSpread>::empty();
            const int classes = target.ignored ? 0 : slice.count;
            for (int c = column.part * kClassesAtOnce; c < classes; c += column.parts * kClassesAtOnce) {
                A z[kClassesAtOnce], u[kClassesAtOnce];
#pragma unroll
                for (int k = 0; k < kClassesAtOnce; ++k) {  // beyond the last class: masked, of weight zero
                    const bool valid = c + k < classes;
                    z[k] = valid ? to_acc(slice.logits[(c + k) * slice.stride]) : -std::numeric_limits<A>::infinity();
                    if (c + k == target.cls) z[k] += bias;
                    u[k] = kSpread && valid ? spread(c + k) : A(0);
                }
                state.push(z, u);
            }
            reduce_team(column, state);
            if (!exists) return;
            if (target.ignored) {
                end.ignore(row, column.records());
                if (p.grad) write_zeros(p, column, row, slice);
                return;
            }
            const A target_logit = target.cls < 0 ? A(0) : to_acc(slice.logits[target.cls * slice.stride]) + bias;
            const auto coefficients = end.finish(row, target, target_logit, state, column.records());
            if (p.grad) write_gradient<kSpread>(args, column, row, slice, target.cls, coefficients);
        });
    write_loss(args, end.sums);
}

// One thread per row in shared memory: x holds its logits, then their exponentials, then the gradient.
template <bool kSpread>
FL_DEVICE void staged_row(const RowArgs<float>& args, const Row& row, float* x, RowEnd<float>& end) {
    using A = float;
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const Target target = target_of(p, row);
    if (target.ignored) {
        end.ignore(row, true);
        for (int c = 0; c < classes; ++c) x[c] = A(0);
        return;
    }
    if (target.cls >= 0) x[target.cls] += bias_of(args);
    const A target_logit = target.cls < 0 ? A(0) : x[target.cls];
    using State = SoftmaxState<A, kSpread>;
    auto state = State::empty();
    for (int c = 0; c < classes; ++c) state.max = State::larger(state.max, x[c]);
    const A pivot = State::pivot_of(state.max);
    const SpreadReader<A> spread(p, args, row);
    for (int c = 0; c < classes; ++c) {
        const A distance = x[c] - pivot;
        x[c] = math::exp(distance);
        state.add(distance, kSpread ? spread(c) : A(0), x[c]);
    }
    const auto coefficients = end.finish(row, target, target_logit, state, true);
    for (int c = 0; c < classes; ++c)
        x[c] = coefficients.of_exponential(x[c], kSpread ? spread(c) : A(0), c == target.cls);
}

template <bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<float, kSpread>)
    forward_staged(const __grid_constant__ RowArgs<float> args) {
    __shared__ float memory[StagedTile::kSize];
    const RowProblem& p = args.problem;
    const StagedTile tile(memory, p);
    RowEnd<float> end(args);
    tile.for_each([&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read_logits(first, rows);
        __syncthreads();
        if (me < rows) staged_row<kSpread>(args, row_at(p, first + me), tile.row(me), end);
        if (!p.grad) return;
        __syncthreads();
        tile.write_gradient(first, rows);
    });
    write_loss(args, end.sums);
}

template <class A>
__global__ void __launch_bounds__(kBlock) sum_weights(const __grid_constant__ RowArgs<A> args) {
    const RowProblem& p = args.problem;
    LossSums sums{0, 0};
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock, rows = p.rows();
    for (std::int64_t number = std::int64_t(blockIdx.x) * kBlock + threadIdx.x; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const A weight = class_weight_of<A>(p, target) * sample_weight_of<A>(p, row);
        if (!target.ignored) sums.weight += static_cast<double>(weight);
    }
    if (sum_over_grid(sums, args.out)) *static_cast<A*>(args.out.denominator) = static_cast<A>(sums.weight);
}

}  // namespace

cudaError_t enqueue_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.rows() == 0 && !out.loss) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        RowArgs<acc_t<Stored>> args(p, out);
        const Regime regime = regime_of(p);
        if constexpr (!kIsForChecking<Stored>) {
            if (regime == Regime::kStaged)
                return launch_over_rows(forward_staged<kSpread>, p.rows(), kBlock, stream, args);
            if (regime == Regime::kThread)
                return launch_pixels<Stored>(forward_by_thread<Stored, kSpread>, args, stream);
        }
        return launch_rows<Stored>(forward_by_group<Stored, kSpread>, threads_of(regime, false), args, stream);
    });
}

cudaError_t enqueue_denominator(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    constexpr std::int64_t rows_per_block = 4 * kBlock;
    const auto run = [&](auto kernel, const auto& args) {
        return launch_over_rows(kernel, p.rows(), rows_per_block, stream, args);
    };
    if (p.dtype == Dtype::kFloat64) return run(sum_weights<double>, RowArgs<double>(p, out));
    return run(sum_weights<float>, RowArgs<float>(p, out));
}

}  // namespace fused_losses::cuda
