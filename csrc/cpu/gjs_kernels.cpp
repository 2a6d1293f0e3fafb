// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/kernels.h"

#include "cpu/row_sums.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// A row of all views at a time, a vector of classes at a time; probabilities and their mean stay in scratch.
template <class A>
class GjsRows {
    using V = Vec<A>;

public:
    GjsRows(const RowProblem& problem, const GjsViews& of_views)
        : p(problem),
          views(of_views),
          normaliser(A(views.normaliser())),
          logits(p.num_classes, -std::numeric_limits<A>::infinity()),
          padded(logits.padded),
          mean(padded),
          logs(views.count * padded),
          probabilities(views.count * padded) {}

    void take(std::int64_t number) const {
        const std::int64_t outer = number / p.inner, row = number % p.inner;
        const std::int64_t target = class_index(p, p.target_stride.at(outer, row));
        for (std::int64_t c = 0; c < padded; c += V::size) V(A(0)).store(mean.data() + c);
        for (int i = 0; i < views.count; ++i) add_view(i, outer, row);
        mean.data()[target] += A(views.label_weight);
        for (std::int64_t c = 0; c < padded; c += V::size)
            GJS::log_mean(V::load(mean.data() + c)).store(mean.data() + c);
        A value = A(-views.label_weight) * mean.data()[target];
        for (int i = 0; i < views.count; ++i) {
            const A divergence = divergence_of(i);
            value += A(views.views[i].weight) * divergence;
            if (views.views[i].grad) write_gradient(i, outer, row, divergence);
        }
        static_cast<A*>(p.row_values)[number] = normaliser * value;
    }

private:
    A* probabilities_of(int i) const { return probabilities.data() + i * padded; }

    A* logs_of(int i) const { return logs.data() + i * padded; }

    // Makes the view's probabilities and their logarithms, and adds them to the mean by its weight.
    void add_view(int i, std::int64_t outer, std::int64_t row) const {
        const GjsView& view = views.views[i];
        const A* const z =
            logits.read(as<A>(view.logits) + view.logits_stride.at(outer, row), view.logits_class_stride);
        A* const to = probabilities_of(i);
        const V top = max_of_row(z, padded);
        const A sum = sum_of_row<A>(padded, [&](std::int64_t c) FL_INLINE {
            const V below = V::load(z + c) - top, e = math::exp_not_positive(below);
            e.store(to + c);
            below.store(logs_of(i) + c);
            return e;
        });
        const V of_sum = A(1) / sum, log_sum = math::log_normal(sum), weight = A(view.weight);
        for (std::int64_t c = 0; c < padded; c += V::size) {
            const V probability = V::load(to + c) * of_sum;
            probability.store(to + c);
            (V::load(logs_of(i) + c) - log_sum).store(logs_of(i) + c);
            (V::load(mean.data() + c) + weight * probability).store(mean.data() + c);
        }
    }

    // Once the mean is its logarithm. Leaves v in the place of log p.
    A divergence_of(int i) const {
        return sum_of_row<A>(padded, [&](std::int64_t c) FL_INLINE {
            const V probability = V::load(probabilities_of(i) + c);
            const V v = GJS::log_ratio(probability, V::load(logs_of(i) + c), V::load(mean.data() + c));
            v.store(logs_of(i) + c);
            return probability * v;
        });
    }

    void write_gradient(int i, std::int64_t outer, std::int64_t row, A divergence) const {
        const GjsView& view = views.views[i];
        A* const grad = static_cast<A*>(view.grad) + view.grad_stride.at(outer, row);
        const V factor = normaliser * A(view.weight);
        RowProblem of_view;
        of_view.num_classes = p.num_classes, of_view.grad_class_stride = view.grad_class_stride;
        RowBuffer<A>::write_row(of_view, grad, /*unordered=*/false, [&](std::int64_t c, auto) FL_INLINE {
            return factor * V::load(probabilities_of(i) + c) * (V::load(logs_of(i) + c) - V(divergence));
        });
    }

    const RowProblem& p;
    const GjsViews& views;
    const A normaliser;
    const PaddedRow<A> logits;
    const std::int64_t padded;
    const Scratch<A> mean, logs, probabilities;
};

void run(const RowProblem& p, const GjsViews& views, std::int64_t begin, std::int64_t end) {
    const auto all = [&](const auto& rows) {
        for (std::int64_t row = begin; row < end; ++row) rows.take(row);
    };
    p.dtype == Dtype::kFloat64 ? all(GjsRows<double>(p, views)) : all(GjsRows<float>(p, views));
}

}  // namespace
}  // namespace FL_ISA

template <>
GjsKernel gjs_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
