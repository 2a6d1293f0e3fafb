// Gradient of row losses: grad_j = scale (alpha p_j + beta [j = y] + gamma u_j), with p_j = exp(z_j - max) / sum.
// The coefficients are per-row numbers that forward has saved, so no loss is known here.
#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {
namespace {

// The row's coefficients, already multiplied by its scale.
template <class A>
struct Coefficients {
    A max, alpha, beta, gamma;  // alpha multiplies exp(z - max)

    FL_DEVICE Coefficients(const RowProblem& p, const Row& row) {
        const A denominator = p.denominator ? *as<A>(p.denominator) : A(1);
        const A share = denominator == A(0) ? A(0) : A(1) / denominator;
        const A upstream = p.upstream ? as<A>(p.upstream)[p.upstream_stride.at(row.outer, row.inner)] : A(1);
        const A scale = upstream * sample_weight_of<A>(p, row) * share;
        const std::int64_t rows = p.rows();
        const A* stats = as<A>(p.stats) + row.number;
        max = stats[0];
        alpha = stats[rows] * scale;
        beta = stats[2 * rows] * scale;
        gamma = p.spread != Spread::kNone ? stats[3 * rows] * scale : A(0);
    }

    FL_DEVICE A at(A z, A u, bool is_target) const {
        return alpha * math::exp(z - max) + gamma * u + (is_target ? beta : A(0));
    }
};

// kThreads threads per row: a warp or the whole block.
template <class Stored, int kThreads, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient_by_group(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    constexpr int group_count = kBlock / kThreads;
    const int group = threadIdx.x / kThreads, lane = threadIdx.x % kThreads;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t from_stride = p.logits_class_stride, to_stride = p.grad_class_stride, rows = p.rows();
    const A bias = bias_of(args);
    const std::int64_t step = std::int64_t(gridDim.x) * group_count;
    for (std::int64_t number = std::int64_t(blockIdx.x) * group_count + group; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        Stored* grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
        const bool contiguous = from_stride == 1 && to_stride == 1;
        const bool vectors = contiguous && misalignment(logits) == misalignment(grad);
        if (target.ignored) {  // for the whole group; the logits are not read, they may be NaN
            walk_classes<kThreads>(grad, classes, to_stride == 1, lane, [&]<int kCount>(Count<kCount>, int c) {
                const A zeros[kCount] = {};
                store(grad + c * to_stride, zeros);
            });
            continue;
        }
        const Coefficients<A> coefficients(p, row);
        const SpreadReader<Stored> spread(p, args, row);
        walk_classes<kThreads>(logits, classes, vectors, lane, [&]<int kCount>(Count<kCount>, int c) {
            A z[kCount];
            load(logits + c * from_stride, z);
#pragma unroll
            for (int k = 0; k < kCount; ++k) {
                const bool is_target = c + k == target.cls;
                z[k] = coefficients.at(is_target ? z[k] + bias : z[k], kSpread ? spread(c + k) : A(0), is_target);
            }
            store(grad + c * to_stride, z);
        });
    }
}

// One thread per row: few classes, or pixels of which neighbouring threads read neighbours.
template <class Stored, bool kSpread>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>>)
    gradient_by_thread(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    const int classes = static_cast<int>(p.num_classes);
    const std::int64_t from_stride = p.logits_class_stride, to_stride = p.grad_class_stride, rows = p.rows();
    const A bias = bias_of(args);
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock;
    for (std::int64_t number = std::int64_t(blockIdx.x) * kBlock + threadIdx.x; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* logits = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        Stored* grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
        if (target.ignored) {  // the logits are not read, they may be NaN
            for (int c = 0; c < classes; ++c) grad[c * to_stride] = to_stored<Stored>(A(0));
            continue;
        }
        const Coefficients<A> coefficients(p, row);
        const SpreadReader<Stored> spread(p, args, row);
        for (int c = 0; c < classes; c += kClassesAtOnce) {
            A z[kClassesAtOnce];
#pragma unroll
            for (int k = 0; k < kClassesAtOnce; ++k)
                z[k] = c + k < classes ? to_acc(logits[(c + k) * from_stride]) : A(0);
#pragma unroll
            for (int k = 0; k < kClassesAtOnce; ++k) {
                if (c + k >= classes) break;
                const bool is_target = c + k == target.cls;
                const A u = kSpread ? spread(c + k) : A(0);
                const A value = coefficients.at(is_target ? z[k] + bias : z[k], u, is_target);
                grad[(c + k) * to_stride] = to_stored<Stored>(value);
            }
        }
    }
}

}  // namespace

cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    if (p.rows() == 0) return cudaSuccess;
    return dispatch(p, [&]<class Stored, bool kSpread>() {
        const RowArgs<acc_t<Stored>> args(p);
        switch (regime_of(p)) {
            case Regime::kThread:
                return launch(gradient_by_thread<Stored, kSpread>, blocks_for(p.rows(), kBlock), stream, args);
            case Regime::kWarp:
                return launch(gradient_by_group<Stored, 32, kSpread>, blocks_for(p.rows(), kBlock / 32), stream, args);
            case Regime::kBlock:
                return launch(gradient_by_group<Stored, kBlock, kSpread>, blocks_for(p.rows(), 1), stream, args);
        }
        return cudaErrorInvalidValue;
    });
}

}  // namespace fused_losses::cuda
