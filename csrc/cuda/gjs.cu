// The generalised Jensen-Shannon divergence: the lanes of a warp share a row of all views, or a thread has one where
// classes are few or far apart. The first loop over a view brings it into the caches, the last writes its gradient.
#include "losses/gjs.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"

namespace fused_losses::cuda {
namespace {

template <class A, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<A, true>)
    gjs(const __grid_constant__ RowProblem p, const __grid_constant__ GjsViews views, const A normaliser) {
    const ClassesOfLane<kThreads> lane(p);
    each_row<kThreads>(p.rows(), [&](std::int64_t number) {
        const Row row = row_at(p, number);
        const int target = target_of(p, row).cls;
        A top[kMostViews], of_sum[kMostViews], log_sum[kMostViews];
        const auto logit = [&](int i, int c) {
            const GjsView& view = views.views[i];
            return as<A>(view.logits)[view.logits_stride.at(row.outer, row.inner) + c * view.logits_class_stride];
        };
        for (int i = 0; i < views.count; ++i) {
            top[i] = lane.template max<A>([&](int c) { return logit(i, c); });
            const A sum = lane.template sum<A>([&](int c) { return math::exp(logit(i, c) - top[i]); });
            of_sum[i] = A(1) / sum, log_sum[i] = math::log(sum);
        }
        const auto probability = [&](int i, int c) { return math::exp(logit(i, c) - top[i]) * of_sum[i]; };
        const auto log_mean = [&](int c) {
            A m = c == target ? A(views.label_share) : A(0);
            for (int i = 0; i < views.count; ++i) m += A(views.views[i].share) * probability(i, c);
            return GJS::log_mean(m);
        };
        const auto log_ratio = [&](int i, int c, A of_class) {
            return GJS::log_ratio(of_class, logit(i, c) - top[i] - log_sum[i], log_mean(c));
        };
        A value = A(-views.label_share) * log_mean(target);
        for (int i = 0; i < views.count; ++i) {
            const GjsView& view = views.views[i];
            const A divergence = lane.template sum<A>([&](int c) {
                const A of_class = probability(i, c);
                return of_class * log_ratio(i, c, of_class);
            });
            value += A(view.share) * divergence;
            if (!view.grad) continue;
            A* const grad = static_cast<A*>(view.grad) + view.grad_stride.at(row.outer, row.inner);
            lane.each([&](int c) {
                const A of_class = probability(i, c);
                grad[c * view.grad_class_stride] =
                    normaliser * A(view.share) * of_class * (log_ratio(i, c, of_class) - divergence);
            });
        }
        if (lane.first == 0) static_cast<A*>(p.row_values)[number] = normaliser * value;
    });
}

template <class A>
cudaError_t enqueue_as(const RowProblem& p, const GjsViews& views, cudaStream_t stream) {
    const A normaliser = static_cast<A>(views.normaliser());
    return with_lanes(p.num_classes, views.views[0].logits_class_stride, [&]<int kThreads>() {
        return launch(gjs<A, kThreads>, blocks_for(p.rows(), kBlock / kThreads), stream, p, views, normaliser);
    });
}

}  // namespace

cudaError_t enqueue_gjs(const RowProblem& p, const GjsViews& views, cudaStream_t stream) {
    return p.dtype == Dtype::kFloat64 ? enqueue_as<double>(p, views, stream) : enqueue_as<float>(p, views, stream);
}

}  // namespace fused_losses::cuda
