// Row statistics: each row is read once, by lanes of a warp where its classes are contiguous, else by a thread,
// whose neighbours then have the neighbouring pixels.
#include "core/row_statistics.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_team.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {
namespace {

template <class A>
using Summary = RowSummary<A, int>;

// Over the lanes that share a row; every lane gets the result.
template <int kThreads, class A>
FL_DEVICE Summary<A> merge_over_lanes(Summary<A> mine) {
    if constexpr (kThreads == 1) return mine;
    const A top = over_lanes<kThreads>(mine.top, Larger());
    const bool has_top = mine.top == top;
    const int index = over_lanes<kThreads>(has_top ? mine.index : std::numeric_limits<int>::max(),
                                           [](int a, int b) { return b < a ? b : a; });
    const A next = has_top && mine.index == index ? mine.second : mine.top;
    mine.move_to(Summary<A>::pivot_of(top), mine.top);
    return {top, over_lanes<kThreads>(next, Larger()), index, over_lanes<kThreads>(mine.sum, Plus()),
            over_lanes<kThreads>(mine.weighted, Plus())};
}

template <class Stored, int kThreads>
__global__ void __launch_bounds__(kBlock) statistics(const __grid_constant__ RowProblem p) {
    using A = acc_t<Stored>;
    const ClassesOfLane<kThreads> lane(p);
    each_row<kThreads>(p.rows(), [&](std::int64_t number) {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const auto logit = [&](int c) { return to_acc(x[kThreads > 1 ? c : c * p.logits_class_stride]); };
        Summary<A> all = Summary<A>::none();
        constexpr int few = kIsForChecking<Stored> ? 1 : kThreads == 1 ? 5 : kThreads == 8 ? 7 : 8;  // of 10, 100, 1000
        lane.template each_few<few, A>(logit, [&](int c, const A(&z)[few]) { all.push(z, c, kThreads); });
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
    return visit_dtype(p.dtype, [&]<class Stored>() { return enqueue_as<Stored>(p, stream); });
}

}  // namespace fused_losses::cuda
