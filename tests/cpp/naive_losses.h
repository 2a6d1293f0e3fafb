// Every loss once more, straight from its published formula: in long double, without a thought for speed or
// cancellation, and sharing no code with csrc/losses. Each loss must have an entry here.
#pragma once

#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "check.h"

namespace fused_losses_test {

using Real = long double;
using Params = std::vector<double>;

struct NaiveLoss {
    const char* name;
    std::vector<Params> params;  // the sets to test
    // phi(p_y) and w = -dphi/dt, t = log p_y. Null for cross entropy, which looks at the whole row.
    Real (*value)(Real p, Real t, const double* a);
    Real (*w)(Real p, Real t, const double* a);
};

inline Real taylor(Real p, int order) {
    Real sum = 0;
    for (int k = 1; k <= order; ++k) sum += std::pow(1 - p, Real(k)) / k;
    return sum;
}

inline Real jensen_shannon(Real p, Real t, Real pi) {
    const Real m = pi + (1 - pi) * p, h = -(1 - pi) * std::log(1 - pi);
    const Real cross = p == 0 ? Real(0) : p * (t - std::log(m));
    return (-pi * std::log(m) + (1 - pi) * cross - (1 - pi) * (1 - p) * std::log(1 - pi)) / h;
}

inline Real jensen_shannon_w(Real p, Real t, Real pi) {
    const Real m = pi + (1 - pi) * p, h = -(1 - pi) * std::log(1 - pi);
    return p == 0 ? Real(0) : -((1 - pi) * p / h) * (std::log(1 - pi) + t - std::log(m));
}

inline Real focal_w(Real p, Real t, Real gamma) {
    if (p == 1) return gamma == 0 ? 1 : 0;
    return std::pow(1 - p, gamma) + (p == 0 ? 0 : gamma * p * std::pow(1 - p, gamma - 1) * -t);
}

inline const std::vector<NaiveLoss>& naive_losses() {
    static const std::vector<NaiveLoss> losses = {
        {"cross_entropy", {{0.0}, {0.1}, {0.5}, {1.0}}, nullptr, nullptr},
        {"mae",
         {{2.0}, {1.0}},
         [](Real p, Real, const double* a) { return a[0] * (1 - p); },
         [](Real p, Real, const double* a) { return a[0] * p; }},
        {"gce",
         {{0.7}, {1.0}, {0.1}, {1e-3}, {2.5}},
         [](Real p, Real, const double* a) { return (1 - std::pow(p, Real(a[0]))) / a[0]; },
         [](Real p, Real, const double* a) { return std::pow(p, Real(a[0])); }},
        {"agce",
         {{0.6, 0.6}, {4.0, 0.2}, {6.0, 1.5}, {1.8, 3.0}, {0.1, 1e-3}},
         [](Real p, Real, const double* a) {
             return (std::pow(Real(a[0]) + 1, Real(a[1])) - std::pow(a[0] + p, Real(a[1]))) / a[1];
         },
         [](Real p, Real, const double* a) { return p * std::pow(a[0] + p, Real(a[1]) - 1); }},
        {"aue",
         {{5.5, 3.0}, {3.0, 0.1}, {1.5, 0.9}, {1.01, 0.5}},
         [](Real p, Real, const double* a) {
             return (std::pow(a[0] - p, Real(a[1])) - std::pow(Real(a[0]) - 1, Real(a[1]))) / a[1];
         },
         [](Real p, Real, const double* a) { return p * std::pow(a[0] - p, Real(a[1]) - 1); }},
        {"ae",
         {{2.5}, {0.2}},
         [](Real p, Real, const double* a) { return std::exp(-p / a[0]); },
         [](Real p, Real, const double* a) { return p / a[0] * std::exp(-p / a[0]); }},
        {"rce",
         {{9.210340371976182}, {4.0}},
         [](Real p, Real, const double* a) { return a[0] * (1 - p); },
         [](Real p, Real, const double* a) { return a[0] * p; }},
        {"sce",
         {{0.1, 1.0, 9.210340371976182}, {6.0, 0.1, 9.210340371976182}, {0.0, 1.0, 4.0}, {1.0, 0.0, 4.0}},
         [](Real p, Real t, const double* a) { return (a[0] == 0 ? 0 : -a[0] * t) + a[1] * a[2] * (1 - p); },
         [](Real p, Real, const double* a) { return a[0] + a[1] * a[2] * p; }},
        {"taylor_ce",
         {{1.0}, {2.0}, {6.0}, {30.0}},
         [](Real p, Real, const double* a) { return taylor(p, int(a[0])); },
         [](Real p, Real, const double* a) { return 1 - std::pow(1 - p, Real(a[0])); }},
        {"phuber_ce",
         {{10.0}, {2.0}, {1.25}},
         [](Real p, Real t, const double* a) { return p > 1 / Real(a[0]) ? -t : 1 + std::log(Real(a[0])) - a[0] * p; },
         [](Real p, Real, const double* a) { return std::fmin(Real(1), a[0] * p); }},
        {"js",
         {{0.5}, {0.1}, {0.9}, {1e-3}},
         [](Real p, Real t, const double* a) { return jensen_shannon(p, t, a[0]); },
         [](Real p, Real t, const double* a) { return jensen_shannon_w(p, t, a[0]); }},
        {"focal",
         {{2.0}, {0.0}, {0.5}, {5.0}},
         [](Real p, Real t, const double* a) { return p == 1 ? 0 : -std::pow(1 - p, Real(a[0])) * t; },
         [](Real p, Real t, const double* a) { return focal_w(p, t, a[0]); }},
        {"bounded_ce",
         {{0.1}, {2.0}},
         [](Real p, Real, const double* a) { return std::log((1 + Real(a[0])) / (p + a[0])); },
         [](Real p, Real, const double* a) { return p / (p + a[0]); }},
    };
    return losses;
}

// Ends the program for a loss without an entry: adding a loss means adding it here.
inline const NaiveLoss& naive_loss(std::string_view name) {
    for (const NaiveLoss& loss : naive_losses())
        if (name == loss.name) return loss;
    std::fprintf(stderr, "FAILED: naive_losses.h has no entry for %.*s\n", int(name.size()), name.data());
    std::exit(1);
}

// How much larger than the rounding of p_y that of the float formula may be: js divides by about pi, aue by a - p.
inline double condition(const NaiveLoss& loss, const double* params) {
    if (loss.name == std::string_view("js")) return 1 / params[0];
    if (loss.name == std::string_view("aue")) return std::fmax(1, 1 / (params[0] - 1));
    return 1;
}

// One row: logits with the bias already on the target's, label y, class weights (or empty), soft target (or empty).
struct NaiveRow {
    std::vector<Real> logits;
    int y = 0;
    std::vector<double> weight, soft;
};

struct NaiveResult {
    Real value = 0;
    Real magnitude = 0;  // of the terms that make up a gradient entry, for a tolerance
    std::vector<Real> grad;
};

inline NaiveResult naive_row(const NaiveLoss& loss, const double* params, const NaiveRow& row) {
    const int classes = static_cast<int>(row.logits.size());
    Real max = row.logits[0], sum = 0;
    for (const Real z : row.logits) max = std::fmax(max, z);
    std::vector<Real> p(classes), log_p(classes);
    for (const Real z : row.logits) sum += std::exp(z - max);
    for (int j = 0; j < classes; ++j) log_p[j] = row.logits[j] - max - std::log(sum), p[j] = std::exp(log_p[j]);
    const auto weight = [&](int j) { return row.weight.empty() ? 1.0 : row.weight[j]; };

    NaiveResult result;
    result.grad.resize(classes);
    if (loss.value && row.soft.empty()) {
        result.value = weight(row.y) * loss.value(p[row.y], log_p[row.y], params);
        const Real w = weight(row.y) * loss.w(p[row.y], log_p[row.y], params);
        for (int j = 0; j < classes; ++j) result.grad[j] = w * (p[j] - (j == row.y));
        result.magnitude = std::fabs(w);
        return result;
    }
    // Cross entropy against the distribution q, which a hard label makes one-hot: torch weighs the label's term by
    // the label's weight and the smoothing by each class's.
    const Real s = params[0];
    Real total = 0;
    std::vector<Real> u(classes);
    for (int j = 0; j < classes; ++j) {
        const Real q = row.soft.empty() ? Real(j == row.y) : Real(row.soft[j]);
        u[j] = weight(j) * ((1 - s) * q + s / classes);
        total += u[j];
        if (u[j] != 0) result.value -= u[j] * log_p[j];
    }
    for (int j = 0; j < classes; ++j) {
        result.grad[j] = total * p[j] - u[j];
        result.magnitude = std::fmax(result.magnitude, std::fabs(u[j]));
    }
    result.magnitude += std::fabs(total);
    return result;
}

}  // namespace fused_losses_test
