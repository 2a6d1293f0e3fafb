// The generalised Jensen-Shannon divergence: the lanes of a warp share a row of all views, or a thread has one where
// classes are few or far apart. Rows of two views and up to 1024 classes stay in registers. Of others the first loop
// over a view brings it into the caches, the last writes its gradient.
#include "losses/gjs.h"

#include "cuda/register_launch.cuh"
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
            A m = c == target ? A(views.label_weight) : A(0);
            for (int i = 0; i < views.count; ++i) m += A(views.views[i].weight) * probability(i, c);
            return GJS::log_mean(m);
        };
        const auto log_ratio = [&](int i, int c, A of_class) {
            return GJS::log_ratio(of_class, logit(i, c) - top[i] - log_sum[i], log_mean(c));
        };
        A value = A(-views.label_weight) * log_mean(target);
        for (int i = 0; i < views.count; ++i) {
            const GjsView& view = views.views[i];
            const A divergence = lane.template sum<A>([&](int c) {
                const A of_class = probability(i, c);
                return of_class * log_ratio(i, c, of_class);
            });
            value += A(view.weight) * divergence;
            if (!view.grad) continue;
            A* const grad = static_cast<A*>(view.grad) + view.grad_stride.at(row.outer, row.inner);
            lane.each([&](int c) {
                const A of_class = probability(i, c);
                grad[c * view.grad_class_stride] =
                    normaliser * A(view.weight) * of_class * (log_ratio(i, c, of_class) - divergence);
            });
        }
        if (lane.first == 0) static_cast<A*>(p.row_values)[number] = normaliser * value;
    });
}

// Two views of floats.
template <int kThreads, int kHeld>
__global__ void __launch_bounds__(kBlock, kHeld > 16 ? 1 : 2)
    gjs_in_registers(const __grid_constant__ RowProblem p, const __grid_constant__ GjsViews views,
                     const float normaliser) {
    constexpr int count = 2;
    const HeldClasses<kThreads, kHeld> lane(p);
    each_row<kThreads>(p.rows(), [&](std::int64_t number) {
        const Row row = row_at(p, number);
        const int target = target_of(p, row).cls;
        float probability[count][kHeld], log_ratio[count][kHeld], divergence[count];
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const GjsView& view = views.views[i];
            const float* const from = as<float>(view.logits) + view.logits_stride.at(row.outer, row.inner);
            float (&z)[kHeld] = log_ratio[i];
            lane.read(z, from, view.logits_class_stride, -std::numeric_limits<float>::infinity());
            const float top = lane.max(z);
            const float sum = lane.template sum<float>([&](int k) {
                z[k] -= top;
                return probability[i][k] = math::exp_not_positive(z[k]);
            });
            const float of_sum = 1.0f / sum, log_sum = math::log(sum);
            lane.each([&](int k) { probability[i][k] *= of_sum, z[k] -= log_sum; });
        }
        const float of_label = lane.template sum<float>([&](int k) {
            const bool is_target = lane.class_of(k) == target;
            float m = is_target ? static_cast<float>(views.label_weight) : 0.0f;
#pragma unroll
            for (int i = 0; i < count; ++i) m += static_cast<float>(views.views[i].weight) * probability[i][k];
            const float log_mean = GJS::log_mean(m);
#pragma unroll
            for (int i = 0; i < count; ++i)
                log_ratio[i][k] = GJS::log_ratio(probability[i][k], log_ratio[i][k], log_mean);
            return is_target ? log_mean : 0.0f;
        });
        float value = static_cast<float>(-views.label_weight) * of_label;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            const GjsView& view = views.views[i];
            divergence[i] = lane.template sum<float>([&](int k) { return probability[i][k] * log_ratio[i][k]; });
            value += static_cast<float>(view.weight) * divergence[i];
            if (!view.grad) continue;
            float* const grad = static_cast<float*>(view.grad) + view.grad_stride.at(row.outer, row.inner);
            const float scale = normaliser * static_cast<float>(view.weight);
            lane.write(grad, view.grad_class_stride,
                       [&](int k) { return scale * probability[i][k] * (log_ratio[i][k] - divergence[i]); });
        }
        if (lane.first == 0) static_cast<float*>(p.row_values)[number] = normaliser * value;
    });
}

// kDoesNotFit for other numbers of views or classes.
cudaError_t enqueue_in_registers(const RowProblem& p, const GjsViews& views, cudaStream_t stream) {
    const auto launch_for = [&](auto kernel, int threads) {
        return launch(kernel, blocks_for(p.rows(), kBlock / threads), stream, p, views,
                      static_cast<float>(views.normaliser()));
    };
    if (views.count != 2 || p.dtype == Dtype::kFloat64) return kDoesNotFit;
    if (p.num_classes <= 10) return launch_for(gjs_in_registers<1, 10>, 1);
    if (views.views[0].logits_class_stride != 1) return kDoesNotFit;
    if (p.num_classes <= 8 * 13) return launch_for(gjs_in_registers<8, 13>, 8);
    if (p.num_classes <= 32 * 13) return launch_for(gjs_in_registers<32, 13>, 32);
    if (p.num_classes <= 32 * 32) return launch_for(gjs_in_registers<32, 32>, 32);
    return kDoesNotFit;
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
    if (const cudaError_t error = enqueue_in_registers(p, views, stream); error != kDoesNotFit) return error;
    return p.dtype == Dtype::kFloat64 ? enqueue_as<double>(p, views, stream) : enqueue_as<float>(p, views, stream);
}

}  // namespace fused_losses::cuda
