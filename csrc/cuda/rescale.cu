// Logits whose norm is fixed or bounded: lanes of a warp share a row where its classes are contiguous, else a thread
// has one. The first loop over a row brings it into the caches, the second writes.
#include "losses/rescale.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"

namespace fused_losses::cuda {
namespace {

template <class Stored, int kThreads, bool kBackward>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, true>)
    rescale(const __grid_constant__ RowProblem p, const __grid_constant__ LogitRescale of) {
    using A = acc_t<Stored>;
    using Written = std::conditional_t<kBackward, Stored, A>;
    const ClassesOfLane<kThreads> lane(p);
    const A parameter = of.on_device ? *as<A>(of.on_device) : A(of.parameter);
    each_row<kThreads>(p.rows(), [&](std::int64_t number) {
        const Row row = row_at(p, number);
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        Written* const to = static_cast<Written*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
        A* const norm = static_cast<A*>(of.norms) + number;
        const bool ignored = target_of(p, row).ignored;
        const auto logit = [&](int c) { return to_acc(x[c * p.logits_class_stride]); };
        const auto write_each = [&](auto value) {
            lane.each([&](int c) { to[c * p.grad_class_stride] = to_stored<Written>(value(c)); });
        };
        const auto write_all = [&](auto value) {  // after all sums, in which all lanes of the warp take part
            if (ignored)
                write_each([](int) { return A(0); });
            else
                write_each(value);
        };
        if constexpr (kBackward) {
            const A* const g = as<A>(of.upstream) + of.upstream_stride.at(row.outer, row.inner);
            const auto upstream = [&](int c) { return g[c * of.upstream_class_stride]; };
            const RescaleFactor<A> by(of.clips, parameter, *norm);
            const A along =
                by.slope * lane.template sum<A>([&](int c) { return unless_masked(logit(c)) * upstream(c); });
            write_all([&](int c) { return upstream(c) * by.factor + unless_masked(logit(c)) * along; });
        } else {
            const A length = ::sqrt(lane.template sum<A>([&](int c) {
                const A z = unless_masked(logit(c));
                return z * z;
            }));
            if (lane.first == 0) *norm = ignored ? A(0) : length;
            const A factor = RescaleFactor<A>(of.clips, parameter, length).factor;
            write_all([&](int c) { return logit(c) * factor; });
        }
    });
}

template <class Stored, bool kBackward>
cudaError_t enqueue_in(const RowProblem& p, const LogitRescale& of, cudaStream_t stream) {
    return with_lanes(p.num_classes, p.logits_class_stride, [&]<int kThreads>() {
        return launch(rescale<Stored, kThreads, kBackward>, blocks_for(p.rows(), kBlock / kThreads), stream, p, of);
    });
}

}  // namespace

cudaError_t enqueue_rescale(const RowProblem& p, const LogitRescale& of, cudaStream_t stream) {
    return visit_dtype(p.dtype, [&]<class Stored>() {
        return of.upstream ? enqueue_in<Stored, true>(p, of, stream) : enqueue_in<Stored, false>(p, of, stream);
    });
}

}  // namespace fused_losses::cuda
