// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/gjs_kernels.h"

#include "cpu/row_buffer.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// A row of all views at a time, a vector of classes at a time; probabilities and their mean stay in scratch.
template <class A>
class GjsRows {
    using V = Vec<A>;
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();

public:
    GjsRows(const RowProblem& problem, const GjsViews& of_views)
        : p(problem),
          views(of_views),
          classes(p.num_classes),
          normaliser(A(views.normaliser())),
          logits(classes),
          mean(classes),
          logs(classes),
          probabilities(views.count * classes) {}

    void take(std::int64_t number) const {
        const std::int64_t outer = number / p.inner, row = number % p.inner;
        const std::int64_t target = class_index(p, p.target_stride.at(outer, row));
        for (std::int64_t c = 0; c < classes; ++c) mean.data()[c] = A(0);
        for (int i = 0; i < views.count; ++i) add_view(i, outer, row);
        mean.data()[target] += A(views.label_share);
        A value = A(-views.label_share) * math::log(mean.data()[target]);
        for (int i = 0; i < views.count; ++i) {
            const A divergence = divergence_of(i);
            value += A(views.views[i].share) * divergence;
            if (views.views[i].grad) write_gradient(i, outer, row, divergence);
        }
        static_cast<A*>(p.row_values)[number] = normaliser * value;
    }

private:
    A* probabilities_of(int i) const { return probabilities.data() + i * classes; }

    // Makes the view's probabilities and adds its share of them to the mean.
    void add_view(int i, std::int64_t outer, std::int64_t row) const {
        const GjsView& view = views.views[i];
        const A* z = as<A>(view.logits) + view.logits_stride.at(outer, row);
        if (view.logits_class_stride != 1) {
            RowBuffer<A>::widen_row(z, view.logits_class_stride, classes, logits.data());
            z = logits.data();
        }
        A* const to = probabilities_of(i);
        const V top = max_of_row(z, classes);
        const V of_sum = A(1) / sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
                             const V e = math::exp_not_positive(load_n_or(z + c, count, kLowest) - top);
                             store_n(to + c, e, count);
                             return e;
                         });
        for_vectors<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V probability = load_n_or(to + c, count, A(0)) * of_sum;
            store_n(to + c, probability, count);
            store_n(mean.data() + c, load_n_or(mean.data() + c, count, A(0)) + V(A(view.share)) * probability, count);
        });
    }

    // Leaves the logarithms in scratch.
    A divergence_of(int i) const {
        return sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V probability = load_n_or(probabilities_of(i) + c, count, A(0));
            const V log_ratio = GJS::log_ratio(probability, load_n_or(mean.data() + c, count, A(1)));
            store_n(logs.data() + c, log_ratio, count);
            return probability * log_ratio;
        });
    }

    void write_gradient(int i, std::int64_t outer, std::int64_t row, A divergence) const {
        const GjsView& view = views.views[i];
        A* const grad = static_cast<A*>(view.grad) + view.grad_stride.at(outer, row);
        const V factor = normaliser * A(view.share);
        const auto value = [&](std::int64_t c, auto count) FL_INLINE {
            const V probability = load_n_or(probabilities_of(i) + c, count, A(0));
            return factor * probability * (load_n_or(logs.data() + c, count, A(0)) - V(divergence));
        };
        RowProblem of_view;
        of_view.num_classes = classes, of_view.grad_class_stride = view.grad_class_stride;
        RowBuffer<A>::write_row(of_view, grad, /*unordered=*/false, value);
    }

    const RowProblem& p;
    const GjsViews& views;
    const std::int64_t classes;
    const A normaliser;
    const Scratch<A> logits, mean, logs, probabilities;
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
