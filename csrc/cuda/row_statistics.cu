// Row statistics: each row is read once, by lanes of a warp where its classes are contiguous, else by a thread,
// whose neighbours then have the neighbouring pixels.
#include "core/row_statistics.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {
namespace {

template <class A>
using Summary = RowSummary<A, int>;

// Over the lanes that share a row; every lane gets the result.
template <int kThreads, class A>
FL_DEVICE Summary<A> merge_over_lanes(Summary<A> mine) {
#pragma unroll
    for (int distance = kThreads / 2; distance > 0; distance /= 2) {
        const auto from = [&](auto x) { return __shfl_xor_sync(0xffffffffu, x, distance); };
        const Summary<A> other{from(mine.top), from(mine.second), from(mine.index), from(mine.sum),
                               from(mine.weighted)};
        mine.merge(other);
    }
    return mine;
}

template <class Stored, int kThreads>
__global__ void __launch_bounds__(kBlock) statistics(const __grid_constant__ RowProblem p) {
    using A = acc_t<Stored>;
    const ClassesOfLane<kThreads> lane(p);
    each_row<kThreads>(p.rows(), [&](std::int64_t number) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const auto logit = [&](int c) { return to_acc(x[c * p.logits_class_stride]); };
        Summary<A> all = Summary<A>::none();
        lane.each([&](int c) { all.push(logit(c), c); });
        all = merge_over_lanes<kThreads>(all);
        if (lane.first > 0) return;
        write_row_statistics(p, number, target, all.sum, all.index, all.finish(logit(target.cls), target.cls), logit);
    });
}

template <class Stored>
cudaError_t enqueue_as(const RowProblem& p, cudaStream_t stream) {
    return with_lanes(p.num_classes, p.logits_class_stride, [&]<int kThreads>() {
        return launch(statistics<Stored, kThreads>, blocks_for(p.rows(), kBlock / kThreads), stream, p);
    });
}

}  // namespace

cudaError_t enqueue_row_statistics(const RowProblem& p, cudaStream_t stream) {
    switch (p.dtype) {
        case Dtype::kFloat64: return enqueue_as<double>(p, stream);
        case Dtype::kFloat32: return enqueue_as<float>(p, stream);
        case Dtype::kFloat16: return enqueue_as<Half>(p, stream);
        case Dtype::kBFloat16: return enqueue_as<BFloat16>(p, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fused_losses::cuda
