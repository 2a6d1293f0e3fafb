// A random problem for the CUDA kernels, run by cuda_emulation and compared with naive_losses.h.
#pragma once

#include "cuda/launch.h"
#include "cuda_emulation/scheduler.h"
#include "expected_rows.h"

namespace fused_losses_test {

// How the next launches run: their results must not depend on it.
inline void shuffle_launches(bool any_grid) {
    cuda_emulation::resident = cuda_emulation::one_in(2) ? 1 : 1 + cuda_emulation::random() % 3;
    cuda_emulation::largest_grid = any_grid && cuda_emulation::one_in(2) ? 1 + cuda_emulation::random() % 2 : ~0u;
}

template <class Stored>
class CudaCase : ExpectedRows<Stored> {
    using Base = ExpectedRows<Stored>;
    using Base::any_layout, Base::for_rows, Base::ignored, Base::inputs, Base::set_strides, Base::target_of;
    using Base::class_weight, Base::logits, Base::random, Base::soft, Base::p, Base::name;
    using Base::compute_expected, Base::expected_of, Base::sample_weight_of, Base::may_be_zero;
    using typename Base::A, typename Base::P, typename Base::Inputs, typename Base::RowResult;

public:
    using Base::Base;

    void test(const std::string& what) {
        name = what + (soft ? " soft" : "");
        const Layout grad_layout = any_grad_layout();
        const Inputs before = inputs();
        compute_expected();
        Result once(grad_layout, p), again(grad_layout, p);
        run(once);
        run(again);
        check(once == again, "%s: another order of threads gives other bits", name.c_str());
        check(before == inputs(), "%s: an input was written to", name.c_str());
        for_rows([&](std::int64_t o, std::int64_t i) {
            Base::compare_value(o, i, once.values.at(o, i));
            compare_weight(o, i, once.weights.at(o, i));
            Base::compare_gradient(once.grad, "backward", o, i);
        });
        compare_reduction(once);
    }

    void test_isolation(const std::string& what) {
        name = what;
        Base::template check_isolation<Result>(any_grad_layout(), [&](Result& r) { run(r); });
    }

private:
    struct Result : RowResult {
        Guarded<A> weights, scalars;
        Guarded<double> scratch;

        Result(const Layout& grad, const RowProblem& p)
            : RowResult(grad, p),
              weights(RowResult::values),
              scalars(layout_of(Kind::kRows, 1, 2, 1)),
              scratch(layout_of(Kind::kRows, 1, cuda::reduction_scratch(p.rows()), 1)) {}

        bool operator==(const Result& other) const {
            return RowResult::operator==(other) && weights == other.weights && scalars == other.scalars &&
                   scratch == other.scratch;
        }
        bool only_elements_written() const {
            return RowResult::only_elements_written() && weights.only_elements_written() &&
                   scalars.only_elements_written() && scratch.only_elements_written();
        }
    };

    // The logits' own in half of the cases, so that rows can be read and written by vectors.
    Layout any_grad_layout() { return random.one_in(2) ? logits.layout : any_layout(); }

    bool has_mean() const { return p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean; }

    // Forward, gradient and reduction into a fresh result.
    void run(Result& result) {
        RowProblem q = p;
        q.row_values = result.values.data();
        q.row_weights = result.weights.data();
        q.stats = result.stats.data();
        q.grad = result.grad.data();
        set_strides(result.grad_layout, q.grad_stride, q.grad_class_stride);
        const bool passes = is_pass_loss(q.loss);
        shuffle_launches(true);
        cudaError_t error = passes ? cuda::enqueue_pass_forward(q, nullptr) : cuda::enqueue_forward(q, nullptr);
        check(error == cudaSuccess, "%s: forward was not launched", name.c_str());
        const RowResult after_forward = result;
        shuffle_launches(true);
        error = passes ? cuda::enqueue_pass_gradient(q, nullptr) : cuda::enqueue_gradient(q, nullptr);
        check(error == cudaSuccess, "%s: gradient was not launched", name.c_str());
        check(result.values == after_forward.values && result.stats == after_forward.stats,
              "%s: gradient changed what forward saved", name.c_str());
        if (!has_mean()) q.row_weights = nullptr;
        shuffle_launches(false);
        error = cuda::enqueue_reduction(q, result.scratch.data(), &result.scalars.at(0, 0),
                                        has_mean() ? &result.scalars.at(0, 1) : nullptr, nullptr);
        check(error == cudaSuccess, "%s: the reduction was not launched", name.c_str());
        check(result.only_elements_written(), "%s: a kernel wrote outside its outputs", name.c_str());
    }

    // A row's share of the denominator.
    void compare_weight(std::int64_t o, std::int64_t i, A got) {
        if (ignored(o, i)) {
            check(got == A(0), "%s: an ignored row has a weight", name.c_str());
            return;
        }
        const double of_class = p.class_weight && !soft ? double(class_weight.at(0, 0, target_of(o, i))) : 1.0;
        const double weight = sample_weight_of(o, i) * of_class;
        const bool counts_active = is_pass_loss(p.loss) && p.reduction == Reduction::kActiveMean;
        const bool either = counts_active && may_be_zero(expected_of(o, i));
        const double want = counts_active && !(expected_of(o, i).value > 0) ? 0.0 : weight;
        const bool right = std::fabs(double(got) - want) <= 1e-6 * weight || (either && double(got) == 0);
        check(right || (either && std::fabs(double(got) - weight) <= 1e-6 * weight), "%s: weight %.9g, not %.9g",
              name.c_str(), double(got), want);
    }

    void compare_reduction(Result& result) {
        double value = 0, weight = 0, size = 0;
        for_rows([&](std::int64_t o, std::int64_t i) {
            value += double(result.values.at(o, i)), weight += double(result.weights.at(o, i));
            size += std::fabs(double(result.values.at(o, i)));
        });
        if (p.reduction == Reduction::kActiveMean) weight += kActiveGuard;
        const double divisor = !has_mean() ? 1.0 : (weight == 0 ? HUGE_VAL : weight);
        const double got = double(result.scalars.at(0, 0)), want = value / divisor;
        check(std::fabs(got - want) <= 1e-6 * size / divisor, "%s: loss %.9g, not %.9g", name.c_str(), got, want);
        if (!has_mean()) return;
        const double denominator = double(result.scalars.at(0, 1));
        check(std::fabs(denominator - weight) <= 1e-6 * weight, "%s: denominator %.9g, not %.9g", name.c_str(),
              denominator, weight);
    }
};

}  // namespace fused_losses_test
