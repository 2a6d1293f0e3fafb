// Row statistics: each row is read once, by the lanes of a warp where its classes are contiguous, else by a thread,
// whose neighbours then have the neighbouring pixels.
#include "core/row_statistics.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kWarp = 32;

template <class A>
using Summary = RowSummary<A, int>;

// Over all lanes of the warp; every lane gets the result.
template <class A>
FL_DEVICE Summary<A> merge_over_warp(Summary<A> mine) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
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
    const int lane = threadIdx.x % kThreads, classes = static_cast<int>(p.num_classes);
    const std::int64_t step = std::int64_t(gridDim.x) * (kBlock / kThreads);
    std::int64_t number = std::int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
    for (; number < p.rows(); number += step) {  // of all lanes of a warp alike
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const auto logit = [&](int c) { return to_acc(x[c * p.logits_class_stride]); };
        Summary<A> all = Summary<A>::none();
        for (int c = lane; c < classes; c += kThreads) all.push(logit(c), c);
        if constexpr (kThreads > 1) all = merge_over_warp(all);
        if (lane > 0) continue;
        write_row_statistics(p, number, target, all.sum, all.index, all.finish(logit(target.cls), target.cls), logit);
    }
}

template <class Stored>
cudaError_t enqueue_as(const RowProblem& p, cudaStream_t stream) {
    constexpr int kFew = 16;  // less than half of a warp would have something to do
    if (p.logits_class_stride == 1 && p.num_classes > kFew)
        return launch(statistics<Stored, kWarp>, blocks_for(p.rows(), kBlock / kWarp), stream, p);
    return launch(statistics<Stored, 1>, blocks_for(p.rows(), kBlock), stream, p);
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
