// Forward of softmax losses: one read of the logits gives each row's value, its share of the denominator and its stats,
// and the sums over all rows; on demand the gradient, for which the row is found in shared memory or in cache.
#include "cuda/pixel_tile.cuh"
#include "cuda/register_launch.cuh"
#include "cuda/residence.cuh"
#include "cuda/row_end.cuh"

namespace fused_losses::cuda {
namespace {

// A row for some lanes, a warp, or the blocks of a cluster.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, kSpread>)
    forward_by_group(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    Group team(args.residence);
    LossSums sums{0, 0};
    RowEnd<A> end(args, sums);
    const A share = written_share<A>(p);
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
            auto coefficients = end.finish(row, target, target_logit, target_logit - state.max, math::log(state.sum),
                                           state, team.records());
            coefficients.scale(share);
            if (p.grad) write_gradient<kSpread>(args, team, row, slice, target.cls, coefficients);
        });
    team.part_company();
    write_loss(args, sums);
}

// One thread per row, or a few: pixels of which neighbouring threads read neighbours, or few classes.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, kSpread>)
    forward_by_thread(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    LossSums sums{0, 0};
    RowEnd<A> end(args, sums);
    const A share = written_share<A>(p);
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
            auto coefficients = end.finish(row, target, target_logit, target_logit - state.max, math::log(state.sum),
                                           state, column.records());
            coefficients.scale(share);
            if (p.grad) write_gradient<kSpread>(args, column, row, slice, target.cls, coefficients);
        });
    write_loss(args, sums);
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
            if (cudaError_t error; enqueue_if_held<Stored, kSpread>(p, out, false, stream, error)) return error;
            if (regime == Regime::kThread)
                return launch_pixels<Stored>(forward_by_thread<Stored, kSpread>, args, stream);
        }
        return launch_rows<Stored>(forward_by_group<Stored, kSpread>, threads_of(regime), args, stream);
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
