// The softmax losses of losses/registry.h: values and slopes against naive_losses.h, gradients against finite
// differences of the values, float against double, and the limits in which one loss becomes another.
#include <algorithm>
#include <string>

#include "check.h"
#include "losses/names.h"
#include "naive_losses.h"

namespace {

using namespace fused_losses;
using namespace fused_losses_test;

// Calls body.operator()<Loss>(naive, params) for every loss and every set of its parameters.
template <class Body>
void for_each_loss(Body body) {
    for (int index = 0; index < SoftmaxLosses::size; ++index) {
        visit_loss(SoftmaxLosses{}, index, [&]<class Loss>() {
            const NaiveLoss& naive = naive_loss(Loss::name);
            for (const Params& params : naive.params) {
                check(params.size() == Loss::num_params, "%s reads %d parameters", Loss::name, Loss::num_params);
                body.template operator()<Loss>(naive, params);
            }
        });
    }
}

// As the operators hand them on.
template <class Loss>
Params with_derived(Params params) {
    params.resize(kMaxParams);
    derive_params<Loss>(params.data());
    return params;
}

std::string describe(const char* name, const Params& params) {
    std::string text = name;
    for (const double a : params) text += (text == name ? "(" : ", ") + std::to_string(a);
    return text + ")";
}

// A row of random logits with what goes with it. u is what sum_neg_log_p weighs: the class weights, ones, or the soft
// target smoothed and weighted.
struct RandomRow {
    std::vector<double> z, weight, soft, u;
    int y;

    RandomRow(Random& random, int classes, bool weighted, ClassFactors u_is, double smoothing = 0)
        : y(random.below(classes)) {
        const bool with_soft = u_is == ClassFactors::kSoftTarget;
        const double spread = random.one_in(2) ? 1 : 4;
        double total = 0;
        for (int j = 0; j < classes; ++j) {
            z.push_back(spread * random.bell());
            weight.push_back(weighted ? random.uniform(0, 2) : 1);
            soft.push_back(random.uniform(0, 1));
            total += soft.back();
        }
        for (int j = 0; j < classes; ++j) {
            soft[j] /= total;
            const double share = with_soft ? (1 - smoothing) * soft[j] + smoothing / classes : 1;
            u.push_back(u_is == ClassFactors::kOnes ? 1 : weight[j] * share);
        }
        if (!with_soft) soft.clear();
    }

    SoftmaxRow<double> summary() const {
        const double max = *std::max_element(z.begin(), z.end());
        double sum = 0, sum_neg_log_p = 0, sum_u = 0;
        for (const double logit : z) sum += std::exp(logit - max);
        const double lse = max + std::log(sum);
        for (std::size_t j = 0; j < z.size(); ++j) sum_neg_log_p += u[j] * (lse - z[j]), sum_u += u[j];
        return {z[y] - lse, sum_neg_log_p, sum_u, weight[y], double(z.size()), z[y] - max};
    }

    NaiveResult naive(const NaiveLoss& loss, const double* params) const {
        NaiveRow row;
        row.logits.assign(z.begin(), z.end());
        row.y = y, row.weight = weight, row.soft = soft;
        return naive_row(loss, params, row);
    }
};

// dL/dz_j by Eval and by differences of its value, and both against the formulas. `kink` is the log p_y at which the
// second derivative jumps, next to which differences are less exact.
template <class Eval>
void test_gradient(const std::string& name, RandomRow row, const NaiveResult& naive, double kink, Eval eval) {
    const SoftmaxRow<double> summary = row.summary();
    const AffineRow<double> affine = eval(summary);
    const double lse = row.z[row.y] - summary.log_p, size = 1 + double(naive.magnitude);
    const int classes = static_cast<int>(row.z.size());
    check(std::fabs(affine.value - naive.value) <= 1e-12 * (1 + std::fabs(naive.value)),
          "%s: value %.17g, formula %.17Lg", name.c_str(), affine.value, naive.value);
    constexpr double h = 1e-3;
    const bool smooth = std::fabs(summary.log_p - kink) > 4 * h;
    for (int i = 0; i < std::min(classes, 12); ++i) {
        const int j = i == 0 ? row.y : (classes <= 12 ? (row.y + i) % classes : (row.y + i * 83) % classes);
        const double grad =
            affine.alpha * std::exp(row.z[j] - lse) + (j == row.y ? affine.beta : 0.0) + affine.gamma * row.u[j];
        check(std::fabs(grad - naive.grad[j]) <= 1e-12 * size, "%s: gradient %.17g, formula %.17Lg", name.c_str(), grad,
              naive.grad[j]);
        const double start = row.z[j];
        const auto value_at = [&](double step) {
            row.z[j] = start + step;
            return eval(row.summary()).value;
        };
        const double differences = (8 * (value_at(h) - value_at(-h)) - (value_at(2 * h) - value_at(-2 * h))) / (12 * h);
        row.z[j] = start;
        check(!smooth || std::fabs(grad - differences) <= 1e-9 * size, "%s: gradient %.12g, differences %.12g",
              name.c_str(), grad, differences);
    }
}

void test_gradients(int repeats) {
    Random random(3);
    for_each_loss([&]<class Loss>(const NaiveLoss& naive, const Params& params) {
        const double kink = naive.kink ? naive.kink(params.data()) : 1.0;
        const Params derived = with_derived<Loss>(params);
        for (const int classes : {2, 3, 10, 1000}) {
            for (int i = 0; i < repeats; ++i) {
                const RandomRow row(random, classes, i % 2 == 1, Loss::class_factors(params.data()));
                test_gradient(describe(Loss::name, params), row, row.naive(naive, params.data()), kink,
                              [&](const SoftmaxRow<double>& r) { return Loss::eval(r, derived.data()); });
            }
        }
    });
    for (const double smoothing : {0.0, 0.1, 1.0}) {
        for (const int classes : {2, 3, 10, 1000}) {
            for (int i = 0; i < repeats; ++i) {
                const RandomRow row(random, classes, i % 2 == 1, ClassFactors::kSoftTarget, smoothing);
                test_gradient("soft cross entropy", row, row.naive(naive_loss("cross_entropy"), &smoothing), 1.0,
                              [&](const SoftmaxRow<double>& r) { return SoftCrossEntropy::eval(r, &smoothing); });
            }
        }
    }
}

template <class Loss, class T>
AffineRow<T> eval_at(double t, const Params& params) {
    T narrowed[kMaxParams] = {};
    std::ranges::copy(with_derived<Loss>(params), narrowed);
    return Loss::eval(SoftmaxRow<T>{T(t), T(25 - 3 * t), T(10), T(1), T(10)}, narrowed);
}

// log p_y from 0 to far beyond the underflow of p_y, and on to -inf, which a masked target has.
std::vector<double> log_probabilities() {
    std::vector<double> all = {0, -0x1p-149, -1e-30, -0x1p-24, -87.25, -88, -103, -104.5, -700, -1e4};
    for (double t = -1e-8; t > -200; t *= 1.07) all.push_back(double(float(t)));
    return all;
}

// The parameters are rounded to float first, so that only eval's own error is seen: a hundred roundings, and where
// terms of order one cancel or p underflows, a few roundings of one. js divides the difference of such terms by about
// pi.
void test_float() {
    for_each_loss([]<class Loss>(const NaiveLoss& naive, const Params& exact) {
        const double terms = condition(naive, exact.data());
        Params params;
        for (const double a : exact) params.push_back(double(float(a)));
        for (const double t : log_probabilities()) {
            const AffineRow<double> want = eval_at<Loss, double>(t, params);
            const AffineRow<float> got = eval_at<Loss, float>(t, params);
            const double pairs[][2] = {{got.value, want.value}, {got.alpha, want.alpha}, {got.beta, want.beta}};
            for (const auto& [g, w] : pairs)
                check(std::fabs(g - w) <= 1e-5 * std::fabs(w) + 3e-7 * terms,
                      "%s float at log p = %.9g: %.9g, double %.9g", describe(Loss::name, params).c_str(), t, g, w);
        }
    });
}

// At log p_y = -inf a bounded loss is finite with gradient zero, an unbounded one infinite; nothing is NaN.
template <class T>
void test_masked_target() {
    for_each_loss([]<class Loss>(const NaiveLoss& naive, const Params& params) {
        if (!naive.value) return;
        const T infinity = std::numeric_limits<T>::infinity();
        T narrowed[kMaxParams] = {};
        std::ranges::copy(with_derived<Loss>(params), narrowed);
        const AffineRow<T> row = Loss::eval(SoftmaxRow<T>{-infinity, T(0), T(0), T(1), T(10)}, narrowed);
        const Real want = naive.value(0, -HUGE_VALL, params.data()), w = naive.w(0, -HUGE_VALL, params.data());
        const bool same = std::isinf(want) ? row.value == infinity : std::fabs(row.value - want) <= 1e-5 * (1 + want);
        check(same, "%s at p = 0: %g, not %Lg", describe(Loss::name, params).c_str(), double(row.value), want);
        check(!std::isnan(row.alpha) && (std::isinf(want) || std::fabs(row.alpha - w) <= 1e-6 * (1 + w)),
              "%s at p = 0: w = %g, not %Lg", describe(Loss::name, params).c_str(), double(row.alpha), w);
    });
}

template <class A, class B>
void test_limit(const char* what, const Params& a, const Params& b, double tolerance, double scale = 1) {
    for (double t = -1e-6; t > -10; t *= 1.3) {
        const AffineRow<double> x = eval_at<A, double>(t, a), y = eval_at<B, double>(t, b);
        check(std::fabs(x.value - scale * y.value) <= tolerance * (1 + std::fabs(y.value)) &&
                  std::fabs(x.alpha - scale * y.alpha) <= tolerance * (1 + std::fabs(y.alpha)),
              "%s at log p = %g: values %.12g, %.12g, slopes %.12g, %.12g", what, t, x.value, scale * y.value, x.alpha,
              scale * y.alpha);
    }
}

void test_limits() {
    using Mae = OfTarget<MAE>;
    test_limit<OfTarget<GCE>, CrossEntropy>("gce, q -> 0: cross entropy", {1e-9}, {0}, 1e-6);
    test_limit<OfTarget<GCE>, Mae>("gce, q = 1: mae", {1}, {1}, 1e-13);
    test_limit<OfTarget<AGCE>, OfTarget<BoundedCE>>("agce, q -> 0: bounded_ce", {0.1, 1e-9}, {0.1}, 1e-7);
    test_limit<OfTarget<AGCE>, Mae>("agce, q = 1: mae", {0.6, 1}, {1}, 1e-13);
    test_limit<OfTarget<AUE>, Mae>("aue, q = 1: mae", {1.5, 1}, {1}, 1e-13);
    test_limit<OfTarget<RCE>, Mae>("rce: mae scaled by A", {4}, {1}, 1e-13, 4);
    test_limit<OfTarget<SCE>, CrossEntropy>("sce(1, 0): cross entropy", {1, 0, 4}, {0}, 1e-13);
    test_limit<OfTarget<SCE>, OfTarget<RCE>>("sce(0, 1): rce", {0, 1, 4}, {4}, 1e-13);
    test_limit<OfTarget<TaylorCE>, Mae>("taylor_ce, order 1: mae", {1}, {1}, 1e-13);
    test_limit<OfTarget<PHuberCE>, CrossEntropy>("phuber_ce, tau -> inf: cross entropy", {1e12}, {0}, 1e-13);
    test_limit<OfTarget<JS>, CrossEntropy>("js, pi -> 0: cross entropy", {1e-9}, {0}, 1e-4);
    test_limit<NCEMAE, NCE>("nce_mae(1, 0): nce", {1, 0, 1}, {}, 1e-13);
    test_limit<NCEMAE, Mae>("nce_mae(0, 1): mae", {0, 1, 2}, {2}, 1e-13);
    test_limit<NCERCE, NCEMAE>("nce_rce: nce_mae", {1, 0.5, 4}, {1, 0.5, 4}, 0);
    test_limit<NCEAGCE, NCEMAE>("nce_agce, q = 1: nce_mae", {1, 4, 6, 1}, {1, 4, 1}, 1e-13);
    test_limit<OfTarget<Focal>, CrossEntropy>("focal, gamma = 0: cross entropy", {0}, {0}, 1e-13);
}

// The class factors decide which numbers a kernel computes; what they leave out must not matter.
void test_class_factors() {
    for_each_loss([]<class Loss>(const NaiveLoss&, const Params& params) {
        const bool needed = Loss::class_factors(params.data()) != ClassFactors::kNone;
        const Params derived = with_derived<Loss>(params);
        const auto at = [&](double sum_neg_log_p, double sum_u) {
            return Loss::eval(SoftmaxRow<double>{-1.5, sum_neg_log_p, sum_u, 0.7, 10.0}, derived.data());
        };
        const AffineRow<double> one = at(40, 10), other = at(50, 20);
        const bool differs = one.value != other.value || one.alpha != other.alpha || one.gamma != other.gamma;
        const bool no_share = Loss::name != CrossEntropy::name && params.size() > 0 && params[0] == 0;  // of NCE
        check(differs == (needed && !no_share), "%s: class factors are %d", describe(Loss::name, params).c_str(),
              needed);
        check(needed || one.gamma == 0, "%s: gamma without class factors", describe(Loss::name, params).c_str());
    });
}

void test_names() {
    const std::vector<std::string> names = loss_names();
    check(names.size() == naive_losses().size(), "naive_losses.h has %zu losses, the registry %zu",
          naive_losses().size(), names.size());
    for (std::size_t i = 0; i < names.size(); ++i)
        check(index_of(AllLosses{}, names[i]) == int(i), "%s is found at its place", names[i].c_str());
    check(index_of(AllLosses{}, "no_such_loss") == -1, "an unknown loss has no index");
}

}  // namespace

int main(int argc, char** argv) {
    const int repeats = argc > 1 ? std::max(1, std::atoi(argv[1])) : 12;
    test_names();
    test_class_factors();
    test_gradients(repeats);
    test_float();
    test_masked_target<float>();
    test_masked_target<double>();
    test_limits();
    return report("losses");
}
