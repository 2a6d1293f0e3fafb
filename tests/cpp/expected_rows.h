// A random problem together with what naive_losses.h says about each of its rows, and the comparison of a kernel's
// results with it.
#pragma once

#include "case_data.h"

namespace fused_losses_test {

template <class Stored>
class ExpectedRows : protected CaseData<Stored> {
    using Base = CaseData<Stored>;

public:
    using Base::Base;

protected:
    using Base::for_rows, Base::ignored, Base::labels_of, Base::soft_of, Base::target_of;
    using Base::logits, Base::class_weight, Base::margin, Base::sample_weight, Base::upstream, Base::scalars;
    using Base::shape, Base::random, Base::naive, Base::soft, Base::mixes, Base::bias, Base::p;
    using typename Base::A, typename Base::P;

    template <class T>
    static bool same_bits(const T& a, const T& b) {
        return std::memcmp(&a, &b, sizeof(T)) == 0;
    }

    // What kernels fill for every row.
    struct RowResult {
        Guarded<A> values, stats;
        Guarded<Stored> grad;
        Layout grad_layout;

        RowResult(const Layout& grad, const RowProblem& p)
            : values(layout_of(Kind::kRows, p.outer, p.inner, 1)),
              stats(layout_of(Kind::kRows, p.stats_count, p.rows(), 1)),
              grad(grad),
              grad_layout(grad) {}

        bool operator==(const RowResult& other) const {
            return values == other.values && stats == other.stats && grad == other.grad;
        }

        bool only_elements_written() const {
            return values.only_elements_written() && stats.only_elements_written() && grad.only_elements_written();
        }
    };

    void compute_expected() {
        for_rows([&](std::int64_t o, std::int64_t i) {
            expected.push_back(ignored(o, i) ? NaiveResult{} : naive_result(o, i));
        });
    }

    const NaiveResult& expected_of(std::int64_t o, std::int64_t i) const { return expected[o * shape.inner + i]; }
    double sample_weight_of(std::int64_t o, std::int64_t i) {
        return p.sample_weight ? double(sample_weight.at(o, i)) : 1.0;
    }
    // Of a row's value and of its gradient, both before the sample weight.
    double tolerance_of(const NaiveResult& want) const {
        return P::computed * condition(naive, p.params) * (2 + double(want.magnitude));
    }
    // Of a row's value, weighted.
    double value_tolerance(std::int64_t o, std::int64_t i) {
        const NaiveResult& want = expected_of(o, i);
        const double sample = sample_weight_of(o, i);
        return sample * tolerance_of(want) + P::computed * std::fabs(sample * double(want.value));
    }
    // Losses of margins are exact here; others may be rounded to either side of zero.
    bool may_be_zero(const NaiveResult& want) const {
        return !needs_of(p.loss).has_margin && std::fabs(want.value) < 1e-5;
    }

    void compare_value(std::int64_t o, std::int64_t i, A got) {
        if (ignored(o, i)) {
            check(got == A(0), "%s: an ignored row has a value", name.c_str());
            return;
        }
        const double value = sample_weight_of(o, i) * double(expected_of(o, i).value);
        check(std::fabs(double(got) - value) <= value_tolerance(o, i), "%s: value %.9g, not %.9g", name.c_str(),
              double(got), value);
    }

    void compare_gradient(Guarded<Stored>& grad, const char* pass, std::int64_t o, std::int64_t i) {
        const bool zero = ignored(o, i);
        const double above = !p.upstream ? 1.0 : double(upstream.data()[p.upstream_stride.at(o, i)]);
        const double denominator = p.denominator ? double(scalars.at(0, 0, 1)) : 1.0;
        const double scale = denominator == 0 ? 0.0 : sample_weight_of(o, i) * above / denominator;
        for (int c = 0; c < shape.classes; ++c) {
            const double got = double(widen(grad.at(o, i, c)));
            if (zero) {
                check(got == 0, "%s: %s: an ignored row has a gradient", name.c_str(), pass);
                continue;
            }
            const NaiveResult& want = expected_of(o, i);
            const double exact = scale * double(want.grad[c]);
            const double tolerance = std::fabs(scale) * tolerance_of(want) + P::stored * std::fabs(exact) + P::smallest;
            check(std::fabs(got - exact) <= tolerance, "%s: %s: gradient [%lld, %lld, %d] %.9g, not %.9g", name.c_str(),
                  pass, (long long)o, (long long)i, c, got, exact);
        }
    }

    // What a softmax loss saves of a row, as SavedNumber says: the gradient follows, and so does that of the label.
    void compare_saved(Guarded<A>& stats, std::int64_t o, std::int64_t i) {
        if (is_multi_reduction_loss(p.loss) || p.stats_count == 0) return;
        double saved[4] = {};
        for (int k = 0; k < p.stats_count; ++k) saved[k] = double(stats.at(0, k * p.rows() + o * p.inner + i));
        if (ignored(o, i)) {
            for (const double x : saved) check(x == 0, "%s: an ignored row has saved %.9g", name.c_str(), x);
            return;
        }
        const NaiveResult& want = expected_of(o, i);
        const std::int64_t label = soft ? -1 : target_of(o, i);
        for (int c = 0; c < shape.classes; ++c) {
            const double z = double(widen(logits.at(o, i, c)));
            const double of_others =
                saved[kSavedAlpha] * std::exp(z - saved[kSavedMax]) + saved[kSavedGamma] * factor_of(o, i, c);
            const double got = c == label ? saved[kSavedTargetGrad] : of_others, exact = double(want.grad[c]);
            check(std::fabs(got - exact) <= tolerance_of(want), "%s: saved numbers give the gradient %.9g, not %.9g",
                  name.c_str(), got, exact);
        }
        check(!soft || saved[kSavedTargetGrad] == 0, "%s: a row without a label has saved its gradient", name.c_str());
    }

    // NaN or +inf makes its own row not finite and changes no bit of any other row. run(result) fills values and grad.
    template <class Result, class Run>
    void check_isolation(const Layout& grad_layout, Run run) {
        if (p.rows() == 0) return;
        const std::int64_t bad_o = random.below(int(p.outer)), bad_i = random.below(int(p.inner));
        if (ignored(bad_o, bad_i)) return;
        Result clean(grad_layout, p), poisoned(grad_layout, p);
        run(clean);
        logits.at(bad_o, bad_i, random.below(int(shape.classes))) =
            narrow<Stored>(random.one_in(2) ? std::numeric_limits<A>::infinity() : std::numeric_limits<A>::quiet_NaN());
        run(poisoned);
        for_rows([&](std::int64_t o, std::int64_t i) {
            const bool bad = o == bad_o && i == bad_i;
            bool same = same_bits(clean.values.at(o, i), poisoned.values.at(o, i)), finite = true;
            for (int c = 0; c < shape.classes; ++c) {
                same &= same_bits(clean.grad.at(o, i, c), poisoned.grad.at(o, i, c));
                finite &= bool(std::isfinite(widen(poisoned.grad.at(o, i, c))));
            }
            // A class of weight zero may hide what its rows' values are, not what their gradients are.
            double weight = 0;
            for (const auto& label : labels_of(o, i)) weight += soft ? 0 : label.factor * weight_of_class(label.cls);
            for (int c = 0; c < shape.classes && soft; ++c) weight += soft_of(o, i, c) * weight_of_class(c);
            const bool weightless = bad && weight == 0;
            if (weightless && mixes) return;
            finite |= !weightless && bool(std::isfinite(poisoned.values.at(o, i)));
            check(bad ? !finite : same, "%s: row %lld, %lld beside a poisoned one", name.c_str(), (long long)o,
                  (long long)i);
        });
    }

    std::string name;

private:
    double weight_of_class(std::int64_t cls) {
        return p.class_weight && cls >= 0 && cls < shape.classes ? double(class_weight.at(0, 0, cls)) : 1.0;
    }

    // u_j of SoftmaxRow
    double factor_of(std::int64_t o, std::int64_t i, int c) {
        if (p.class_factors == ClassFactors::kOnes) return 1;
        const double weight = p.class_weight ? double(class_weight.at(0, 0, c)) : 1.0, s = p.params[0];
        return soft ? weight * ((1 - s) * soft_of(o, i, c) + s / double(shape.classes)) : weight;
    }

    NaiveResult naive_result(std::int64_t o, std::int64_t i) {
        if (mixes) {
            NaiveResult sum;
            sum.grad.resize(shape.classes);
            for (const auto& label : labels_of(o, i)) sum.add(label.factor, naive_result(o, i, int(label.cls)));
            return sum;
        }
        return naive_result(o, i, soft ? 0 : int(target_of(o, i)));
    }

    NaiveResult naive_result(std::int64_t o, std::int64_t i, int label) {
        NaiveRow row;
        row.y = label;
        for (int c = 0; c < shape.classes; ++c) {
            row.logits.push_back(Real(widen(logits.at(o, i, c))) + (!soft && c == row.y ? bias : 0));
            if (p.class_weight) row.weight.push_back(double(class_weight.at(0, 0, c)));
            if (p.first_param) row.margin.push_back(double(margin.data()[c * p.first_param_stride]));
            if (soft) row.soft.push_back(soft_of(o, i, c));
        }
        return naive_row(naive, p.params, row);
    }

    std::vector<NaiveResult> expected;
};

// The name of a case in messages.
inline std::string describe(const Shape& s, Dtype dtype, int loss) {
    static const char* const dtypes[] = {"double", "float", "half", "bfloat16"};
    static const char* const kinds[] = {"rows", "padded rows", "every other", "pixels", "strided pixels"};
    return loss_names()[loss] + " " + dtypes[int(dtype)] + " " + kinds[int(s.kind)] + " [" + std::to_string(s.outer) +
           ", " + std::to_string(s.inner) + ", " + std::to_string(s.classes) + "]";
}

inline constexpr Dtype kDtypes[] = {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};

}  // namespace fused_losses_test
