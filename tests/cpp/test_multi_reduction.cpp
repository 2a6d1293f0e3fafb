// The multi-reduction losses (core/multi_reduction_loss.h) of losses/registry.h, run over one row of scalars: values
// and gradients against naive_losses.h, gradients against finite differences of the values, and the limits in which one
// loss becomes another.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <typeinfo>

#include "check.h"
#include "losses/names.h"
#include "losses/needs.h"
#include "naive_losses.h"

namespace {

using namespace fused_losses;
using namespace fused_losses_test;

struct Row {
    std::vector<double> z, margin;
    int y;

    RowInputs<double> inputs() const {
        return {*std::max_element(z.begin(), z.end()), z[y], margin[y], double(z.size())};
    }
    NaiveResult naive(const NaiveLoss& loss, const Params& params) const {
        return naive_row(loss, params.data(), {{z.begin(), z.end()}, y, {}, {}, margin});
    }
};

Row random_row(Random& random, int classes) {
    Row row{{}, {}, random.below(classes)};
    const double spread = random.one_in(2) ? 1 : 4, offset = random.uniform(-20, 20);
    for (int j = 0; j < classes; ++j) {
        row.z.push_back(offset + spread * random.bell());
        row.margin.push_back(random.uniform(0, 2));
    }
    return row;
}

template <class Loss>
using StateOf = typename Loss::template State<double>;

template <class Loss, class... Args>
Sums<double, Loss::num_sums> map_of(bool last, Args... args) {
    double* const nothing = nullptr;
    return last ? Loss::template map<true>(args..., nothing) : Loss::template map<false>(args..., nothing);
}

// One pass over the row: the sums of the terms go to `state`.
template <class Loss>
Sums<double, Loss::num_sums> sums_of(int pass, const StateOf<Loss>& state, const Row& row, const double* params) {
    Sums<double, Loss::num_sums> sums = {};
    const int last = passes_of<Loss>(params) - 1;
    for (std::size_t j = 0; j < row.z.size(); ++j) {
        const auto term = map_of<Loss>(pass == last, pass, state, row.z[j], row.margin[j], int(j) == row.y, params);
        for (int k = 0; k < Loss::num_sums; ++k) sums.v[k] += term.v[k];
    }
    return sums;
}

template <class Loss>
StateOf<Loss> run(const Row& row, const Params& params) {
    const RowInputs<double> inputs = row.inputs();
    StateOf<Loss> state = Loss::begin(inputs, params.data());
    for (int pass = 0; pass < passes_of<Loss>(params.data()); ++pass)
        Loss::finalize(pass, state, sums_of<Loss>(pass, state, row, params.data()), inputs, params.data());
    return state;
}

template <class Loss>
double gradient(const StateOf<Loss>& state, const Row& row, const Params& params, int j) {
    return gradient_at<Loss>(state, row.z[j], row.margin[j], j == row.y, params.data());
}

template <class Body>
void for_each_loss(Body body) {
    for (int index = SoftmaxLosses::size; index < AllLosses::size; ++index) {
        visit_multi_reduction_loss(index, [&]<class Loss>() {
            const NaiveLoss& naive = naive_loss(Loss::name);
            for (const Params& params : naive.params) {
                check(params.size() == Loss::num_params, "%s reads %d parameters", Loss::name, Loss::num_params);
                body.template operator()<Loss>(naive, params);
            }
        });
    }
}

std::string describe(const char* name, const Params& params) {
    std::string text = name;
    for (const double a : params) text += (text == name ? "(" : ", ") + std::to_string(a);
    return text + ")";
}

// Whether the gradient is the derivative of the value: not if a factor is held fixed or the normaliser not exact.
bool is_derivative(const NaiveLoss& naive, const Params& params) {
    return !naive.is_derivative || naive.is_derivative(params.data());
}

// Whether differences tell a derivative here: other errors may count a step further, and a softmax of bounded support
// has an edge. `other` is the row a step further.
template <class Loss>
bool is_smooth(const StateOf<Loss>& state, const Row& row, const Row& other, const Params& params) {
    if constexpr (std::is_same_v<Loss, BiTempered>) {
        const auto p = [&](double z) { return std::exp(Loss::log_exp(z - state.max - state.root, params[1] - 1)); };
        return params[1] >= 1 || std::all_of(row.z.begin(), row.z.end(), [&](double z) { return p(z) > 0.01; });
    }
    if (const NaiveLoss& naive = naive_loss(Loss::name); naive.class_kink) {
        const double kink = naive.class_kink(params.data());
        const auto log_p = log_softmax({{row.z.begin(), row.z.end()}, row.y, {}, {}, {}});
        return std::none_of(log_p.begin(), log_p.end(), [=](Real t) { return std::fabs(t - kink) < 0.01; });
    }
    if (!needs_of<Loss>().has_margin) return true;
    const StateOf<Loss> further = run<Loss>(other, params);
    for (int j = 0; j < int(row.z.size()); ++j)
        if (gradient<Loss>(state, row, params, j) != gradient<Loss>(further, other, params, j)) return false;
    return true;
}

long differences_taken = 0;

template <class Loss>
void test_differences(const Row& row, const Params& params, double size) {
    constexpr double h = 1e-3;
    const StateOf<Loss> state = run<Loss>(row, params);
    const int classes = int(row.z.size());
    for (int i = 0; i < std::min(classes, 12); ++i) {
        const int j = (row.y + i * (classes <= 12 ? 1 : 83)) % classes;
        Row other = row;
        bool smooth = true;
        const auto value_at = [&](double step) {
            other.z[j] = row.z[j] + step;
            smooth = smooth && is_smooth<Loss>(state, row, other, params);
            return Loss::value(run<Loss>(other, params));
        };
        const double differences = (8 * (value_at(h) - value_at(-h)) - (value_at(2 * h) - value_at(-2 * h))) / (12 * h);
        if (!smooth) continue;
        ++differences_taken;
        const double grad = gradient<Loss>(state, row, params, j);
        check(std::fabs(grad - differences) <= 2e-9 * size, "%s: gradient %.12g, differences %.12g",
              describe(Loss::name, params).c_str(), grad, differences);
    }
}

void test_gradients(int repeats) {
    Random random(8);
    for_each_loss([&]<class Loss>(const NaiveLoss& naive, const Params& params) {
        const std::string name = describe(Loss::name, params);
        differences_taken = 0;
        for (const int classes : {2, 3, 10, 1000}) {
            for (int i = 0; i < repeats; ++i) {
                const Row row = random_row(random, classes);
                const NaiveResult want = row.naive(naive, params);
                const StateOf<Loss> state = run<Loss>(row, params);
                const double size = 1 + double(want.magnitude), value = Loss::value(state);
                check(std::fabs(value - want.value) <= 2e-12 * (1 + std::fabs(want.value)),
                      "%s: value %.17g, formula %.17Lg", name.c_str(), value, want.value);
                for (int j = 0; j < classes; ++j) {
                    const double grad = gradient<Loss>(state, row, params, j);
                    check(std::fabs(grad - want.grad[j]) <= 2e-12 * size, "%s: gradient %.17g, formula %.17Lg",
                          name.c_str(), grad, want.grad[j]);
                }
                if (is_derivative(naive, params)) test_differences<Loss>(row, params, size);
            }
        }
        check((differences_taken > 0) == is_derivative(naive, params), "%s: %ld differences", name.c_str(),
              differences_taken);
    });
}

// With its factor held fixed nfl is a ratio of weighted cross entropies.
void test_detached_factor(int repeats) {
    Random random(9);
    for (const double gamma : {0.5, 2.0}) {
        const Params params = {gamma, 1};
        for (int i = 0; i < repeats; ++i) {
            const Row row = random_row(random, 10);
            const StateOf<NormalizedLoss<NFL>> state = run<NormalizedLoss<NFL>>(row, params);
            const auto log_p = [](const Row& r) { return log_softmax({{r.z.begin(), r.z.end()}, r.y, {}, {}, {}}); };
            std::vector<Real> factor;
            for (const Real t : log_p(row)) factor.push_back(std::pow(-std::expm1(t), Real(gamma)));
            for (int j = 0; j < 10; ++j) {
                const auto value_at = [&](double step) {
                    Row other = row;
                    other.z[j] += step;
                    const std::vector<Real> t = log_p(other);
                    Real sum = 0;
                    for (int k = 0; k < 10; ++k) sum += factor[k] * t[k];
                    return factor[row.y] * t[row.y] / sum;
                };
                constexpr double h = 1e-4;
                const double differences = double((value_at(h) - value_at(-h)) / (2 * h));
                const double grad = gradient<NormalizedLoss<NFL>>(state, row, params, j);
                check(std::fabs(grad - differences) <= 1e-7, "nfl(%g) detached: gradient %.12g, differences %.12g",
                      gamma, grad, differences);
            }
        }
    }
}

// Two losses that should agree on random rows, values and gradients.
template <class A, class B>
void test_same(const char* what, const Params& a, const Params& b, double tolerance) {
    Random random(10);
    for (int i = 0; i < 20; ++i) {
        Row row = random_row(random, 2 + random.below(20));
        if (needs_of<A>().has_margin) std::fill(row.margin.begin(), row.margin.end(), a[0]);
        const StateOf<A> x = run<A>(row, a);
        const StateOf<B> y = run<B>(row, b);
        check(std::fabs(A::value(x) - B::value(y)) <= tolerance * (1 + std::fabs(A::value(x))),
              "%s: values %.12g, %.12g", what, A::value(x), B::value(y));
        for (int j = 0; j < int(row.z.size()); ++j) {
            const double g = gradient<A>(x, row, a, j), h = gradient<B>(y, row, b, j);
            check(std::fabs(g - h) <= tolerance, "%s: gradients %.12g, %.12g", what, g, h);
        }
    }
}

void test_limits() {
    using Nfl = NormalizedLoss<NFL>;
    test_same<NormalizedLoss<NFLMAE>, Nfl>("nfl_mae(1, 0): nfl", {1, 0, 0.5, 0, 1}, {0.5, 0}, 1e-13);
    test_same<NormalizedLoss<NFLRCE>, NormalizedLoss<NFLMAE>>("nfl_rce: nfl_mae", {2, 3, 0.5, 1, 4}, {2, 3, 0.5, 1, 4},
                                                              0);
    test_same<Nfl, Nfl>("nfl, gamma = 0: nothing to detach", {0, 0}, {0, 1}, 1e-14);
    test_same<NGCE, Nfl>("ngce, q -> 0: nfl, gamma = 0", {1e-9}, {0, 0}, 1e-6);
    test_same<NormalizedLoss<AsNFLSum<ANLCE>>, NormalizedLoss<AsNFLSum<NNCE>>>("anl_ce(0, 1): nnce", {0, 1, 1e-7},
                                                                               {1e-7}, 0);
    test_same<NormalizedLoss<AsNFLSum<ANLFL>>, Nfl>("anl_fl(1, 0): nfl", {1, 0, 0.5, 0, 1e-7}, {0.5, 0}, 1e-13);
    test_same<NormalizedLoss<AsNFLSum<NNFL>>, NormalizedLoss<AsNFLSum<NNCE>>>("nnfl, gamma = 0: nnce", {0, 0, 1e-7},
                                                                              {1e-7}, 1e-13);
    test_same<NormalizedLoss<AsNFLSum<JALCE>>, AMSE>("jal_ce(0, 1): amse", {0, 1, 30}, {30}, 1e-13);
    test_same<NormalizedLoss<AsNFLSum<JALFL>>, NormalizedLoss<AsNFLSum<JALCE>>>("jal_fl, gamma = 0: jal_ce",
                                                                                {2, 3, 0, 1, 30}, {2, 3, 30}, 1e-13);
    test_same<PowerLoss<AnyPowerRule>, NGCE>("any_power: ngce", {0.7, 0, 0}, {0.7}, 0);
    test_same<PowerLoss<AnyPowerRule>, SGCE>("any_power: sgce", {0.7, 1, 0}, {0.7}, 0);
    test_same<PowerLoss<AnyPowerRule>, AMSE>("any_power: amse", {2, 2, 30}, {30}, 0);
    test_same<HEM, MultiMargin>("multi_margin, both options: hem", {0.5, 0}, {0.5, 1, 1, 1}, 0);
    test_same<HEM, HEM>("hem, one margin: either index", {0.5, 0}, {0.5, 1}, 0);
    const auto tempered = [](const char* what, const Params& a, const Params& b, double tolerance) {
        test_same<BiTempered, BiTempered>(what, a, b, tolerance);
    };
    tempered("bi_tempered: the fixed point converges", {0.8, 1.2, 0.1, 500}, {0.8, 1.2, 0.1, 0}, 1e-9);
    tempered("bi_tempered: the bisection converges", {0.5, 0.7, 0, 60}, {0.5, 0.7, 0, 0}, 1e-9);
    tempered("bi_tempered, t2 = 1: no iterations", {0.5, 1, 0.1, 5}, {0.5, 1, 0.1, 0}, 0);
    tempered("bi_tempered: continuous in t1, t2", {1, 1, 0, 0}, {1 - 1e-8, 1 + 1e-8, 0, 0}, 1e-5);
}

// t1 = t2 = 1 is cross entropy.
void test_cross_entropy() {
    Random random(11);
    for (int i = 0; i < 20; ++i) {
        const Row row = random_row(random, 10);
        const StateOf<BiTempered> state = run<BiTempered>(row, {1, 1, 0, 0});
        const double zero = 0;
        const NaiveResult want = naive_cross_entropy({{row.z.begin(), row.z.end()}, row.y, {}, {}, {}}, &zero);
        check(std::fabs(state.value - want.value) <= 1e-13 * (1 + want.value), "bi_tempered(1, 1): cross entropy");
        for (int j = 0; j < 10; ++j)
            check(std::fabs(gradient<BiTempered>(state, row, {1, 1, 0, 0}, j) - want.grad[j]) <= 1e-13,
                  "bi_tempered(1, 1): gradient of cross entropy");
    }
}

// The exact normaliser of the bi-tempered loss, for rows that are hard to normalise: p sums to 1.
void test_normaliser() {
    Random random(12);
    for (const double t2 : {0.3, 0.9, 1.0, 1.05, 1.5, 2.0, 4.0, 10.0}) {
        for (const int classes : {1, 2, 10, 1000, 20000}) {
            for (const double spread : {0.0, 1.0, 20.0, 1000.0}) {
                Row row{{}, std::vector<double>(classes, 0.0), 0};
                for (int j = 0; j < classes; ++j) row.z.push_back(spread * random.bell());
                const Params params = {0.5, t2, 0, 0};
                const StateOf<BiTempered> state = run<BiTempered>(row, params);
                double sum = 0;
                for (const double z : row.z) sum += std::exp(BiTempered::log_exp(z - state.max - state.root, t2 - 1));
                check(std::fabs(sum - 1) <= 1e-12 * (1 + t2),
                      "bi_tempered(t2 = %g), %d classes of spread %g: p sums to 1 + %g", t2, classes, spread, sum - 1);
            }
        }
    }
}

// Rescaling and the loss inside in one: that loss's formula on the rescaled row, and the chain rule.
void test_rescaled() {
    Random random(13);
    const auto test = [&](const NaiveLoss& naive, int place, const Params& own, bool clips) {
        const double parameter = clips ? 2 : 0.2, bias = random.one_in(2) ? 0 : random.uniform(-2, 2);
        Params params = {parameter, double(clips), bias, double(place)};
        params.insert(params.end(), own.begin(), own.end());
        params.resize(kMaxParams);
        derive_params<Rescaled>(params.data());
        Row row = random_row(random, 1 + random.below(20));
        std::fill(row.margin.begin(), row.margin.end(), parameter);
        double squares = 0, along = 0;
        for (const double z : row.z) squares += z * z;
        const RescaleFactor<double> by(clips, parameter, std::sqrt(squares));
        Row inside = row;
        for (double& z : inside.z) z *= by.factor;
        inside.z[row.y] += bias;
        const NaiveResult want = inside.naive(naive, own);
        const StateOf<Rescaled> state = run<Rescaled>(row, params);
        const double value = Rescaled::value(state), size = 1 + double(want.magnitude);
        check(std::fabs(value - want.value) <= 2e-12 * (1 + std::fabs(want.value)), "rescaled %s: value %.17g, %.17Lg",
              naive.name, value, want.value);
        for (std::size_t j = 0; j < row.z.size(); ++j) along += double(want.grad[j]) * row.z[j];
        for (int j = 0; j < int(row.z.size()); ++j) {
            const double right = by.factor * double(want.grad[j]) + by.slope * along * row.z[j];
            const double grad = gradient<Rescaled>(state, row, params, j);
            check(std::fabs(grad - right) <= 2e-12 * size * by.factor, "rescaled %s: gradient %.17g, %.17g", naive.name,
                  grad, right);
        }
    };
    for (int place = 0; place < LossesOfLogP::size; ++place) {
        const NaiveLoss& naive = naive_loss(loss_names()[place]);
        for (const Params& own : naive.params)
            for (const bool clips : {false, true})
                if (place != kCrossEntropy || own[0] == 0) test(naive, place, own, clips);
    }
}

// The faster forms of a loss for some parameters are found by these as the operators hand them on, rounded to floats.
void test_variants() {
    const auto variant = []<class Loss>(const Params& params) {
        const std::type_info* found = nullptr;
        visit_variant<Loss>(params.data(), [&]<class Variant>() { found = &typeid(Variant); });
        return found;
    };
    for_each_loss([&]<class Loss>(const NaiveLoss& naive, const Params& params) {
        Params rounded = params;
        for (double& number : rounded) number = static_cast<float>(number);
        check(*variant.operator()<Loss>(rounded) == *variant.operator()<Loss>(params), "%s: rounded, another variant",
              describe(naive.name, params).c_str());
    });
    const auto tempered = [&](double t1, double t2, double smoothing, double num_iters) {
        return variant.operator()<BiTempered>({t1, t2, smoothing, num_iters});
    };
    check(*tempered(0.8f, 1.2f, 0, 5) == typeid(BiTemperedOf<5, true>), "bi_tempered: the default parameters");
    check(*tempered(0.7f, 1.2f, 0, 5) == typeid(BiTemperedOf<5>), "bi_tempered: another t1");
    check(*tempered(0.8f, 1.2f, 0.1f, 5) == typeid(BiTemperedOf<5>), "bi_tempered: label smoothing");
    check(*tempered(0.8f, 1.5f, 0, 5) == typeid(BiTemperedOf<2>), "bi_tempered: t2 = 1.5");
    check(*tempered(0.8f, 1.2f, 0, 0) == typeid(BiTempered), "bi_tempered: Newton's method");
    check(*tempered(0.8f, 1.2001f, 0, 5) == typeid(BiTempered), "bi_tempered: t2 near 1.2");
}

// Worked by hand: errors 0, 0, 0.5, 0.3 have mean 0.2; of 0, 1, 1, 2 the mean is 1, and ties with it count.
void test_by_hand() {
    const auto value = []<class Loss>(std::vector<double> z, const Params& params) {
        return Loss::value(run<Loss>({z, std::vector<double>(4, params[0]), 0}, params));
    };
    const std::vector<double> z = {1, 0, 1.25, 1.05}, ties = {1, 1, 1, 2};
    const auto near = [](double a, double b) { return std::fabs(a - b) < 1e-12; };
    check(near(value.operator()<HEM>(z, {0.25, 0}), 0.8 / (2 + 1e-6)), "hem by hand");
    check(near(value.operator()<MultiMargin>(z, {0.25, 0, 0, 1}), 0.2), "multi_margin by hand");
    check(near(value.operator()<HEM>(ties, {1, 0}), 4 / (3 + 1e-6)), "hem: errors 1, 1, 2 with mean 1 all count");
    check(near(value.operator()<MultiMargin>(ties, {1, 0, 0, 1}), 1), "multi_margin: errors 1, 1, 2");
    check(near(value.operator()<MultiMargin>(ties, {1, 0, 0, 2}), 1.5), "multi_margin: squares 1, 1, 4");
    check(value.operator()<HEM>({5, 0, 0, 0}, {1, 0}) == 0, "hem without errors is 0");
}

}  // namespace

int main(int argc, char** argv) {
    const int repeats = argc > 1 ? std::max(1, std::atoi(argv[1])) : 12;
    test_by_hand();
    test_variants();
    test_rescaled();
    test_gradients(repeats);
    test_detached_factor(repeats);
    test_limits();
    test_cross_entropy();
    test_normaliser();
    return report("multi-reduction losses");
}
