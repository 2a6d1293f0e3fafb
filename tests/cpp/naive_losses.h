// Every loss once more, straight from its published formula: in long double, without a thought for speed or
// cancellation, and sharing no code with csrc/losses. Each loss must have an entry here.
#pragma once

#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "check.h"
#include "naive_rows.h"

namespace fused_losses_test {

using Params = std::vector<double>;

struct NaiveLoss {
    const char* name;
    std::vector<Params> params;  // the sets to test
    // phi(p_y) and w = -dphi/dt, t = log p_y. Null for losses that look at the whole row.
    Real (*value)(Real p, Real t, const double* a);
    Real (*w)(Real p, Real t, const double* a);
    NaiveResult (*row)(const NaiveRow&, const double* a) = nullptr;  // class weights left out, but for cross entropy
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

inline Real agce(Real p, const double* a) {
    return (std::pow(Real(a[0]) + 1, Real(a[1])) - std::pow(a[0] + p, Real(a[1]))) / a[1];
}

inline Real agce_w(Real p, const double* a) { return p * std::pow(a[0] + p, Real(a[1]) - 1); }

// value = phi(p_y), grad_j = w (p_j - [j = y])
inline NaiveResult of_target(const NaiveRow& row, Real value, Real w) {
    NaiveResult result{value, std::fabs(w)};
    const std::vector<Real> log_p = log_softmax(row);
    for (int j = 0; j < row.classes(); ++j) result.grad.push_back(w * (std::exp(log_p[j]) - (j == row.y)));
    return result;
}

// alpha active + beta passive. Without a share in the sum an active loss that is not finite does not count.
inline NaiveResult sum_of(const double* shares, NaiveResult active, const NaiveResult& passive) {
    for (Real& g : active.grad) g = shares[0] == 0 ? 0 : g;
    if (shares[0] == 0) active.value = active.magnitude = 0;
    active.scale(shares[0]);
    active.add(shares[1], passive);
    return active;
}

inline NaiveResult scaled_mae(const NaiveRow& row, Real scale) {
    const Real p = std::exp(log_softmax(row)[row.y]);
    return of_target(row, scale * (1 - p), scale * p);
}

inline NaiveResult nce_mae(const NaiveRow& row, const double* a) {
    return sum_of(a, naive_nce(row, a), scaled_mae(row, a[2]));
}

inline NaiveResult nfl_mae(const NaiveRow& row, const double* a) {
    return sum_of(a, naive_nfl(row, a + 2), scaled_mae(row, a[4]));
}

inline NaiveResult nce_agce(const NaiveRow& row, const double* a) {
    const Real p = std::exp(log_softmax(row)[row.y]);
    return sum_of(a, naive_nce(row, a), of_target(row, agce(p, a + 2), agce_w(p, a + 2)));
}

inline const std::vector<NaiveLoss>& naive_losses() {
    static const std::vector<NaiveLoss> losses = {
        {"cross_entropy", {{0.0}, {0.1}, {0.5}, {1.0}}, nullptr, nullptr, naive_cross_entropy},
        {"mae",
         {{2.0}, {1.0}},
         [](Real p, Real, const double* a) { return a[0] * (1 - p); },
         [](Real p, Real, const double* a) { return a[0] * p; }},
        {"gce",
         {{0.7}, {1.0}, {0.1}, {1e-3}, {2.5}},
         [](Real p, Real, const double* a) { return (1 - std::pow(p, Real(a[0]))) / a[0]; },
         [](Real p, Real, const double* a) { return std::pow(p, Real(a[0])); }},
        {"agce",
         {{0.6, 0.6}, {4.0, 0.2}, {6.0, 1.5}, {1.8, 3.0}, {0.1, 1e-3}, {1e-6, 0.6}},
         [](Real p, Real, const double* a) { return agce(p, a); },
         [](Real p, Real, const double* a) { return agce_w(p, a); }},
        {"aue",
         {{5.5, 3.0}, {3.0, 0.1}, {1.5, 0.9}, {1.01, 0.5}, {1.01, 20}},
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
         {{0.5}, {0.1}, {0.9}, {1e-3}, {1e-6}},
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
        {"nce", {{}}, nullptr, nullptr, naive_nce},
        {"nce_mae", {{1, 1, 1}, {10, 0.5, 2}, {0, 1, 2}}, nullptr, nullptr, nce_mae},
        {"nce_rce", {{1, 1, 9.210340371976182}, {10, 0.1, 4}, {0, 1, 4}}, nullptr, nullptr, nce_mae},
        {"nce_agce", {{1, 4, 6, 1.5}, {10, 0.1, 1.8, 3}, {0, 1, 4, 0.2}}, nullptr, nullptr, nce_agce},
        {"nfl", {{0.5, 1}, {0.5, 0}, {0, 0}, {2, 0}, {2, 1}}, nullptr, nullptr, naive_nfl},
        {"ngce", {{0.7}, {0.1}, {1.5}, {1e-5}}, nullptr, nullptr, naive_ngce},
        {"nfl_mae", {{1, 1, 0.5, 1, 1}, {10, 0.5, 1, 0, 2}, {0, 1, 0.5, 0, 2}}, nullptr, nullptr, nfl_mae},
        {"nfl_rce", {{1, 1, 0.5, 1, 9.210340371976182}, {10, 0.1, 1, 0, 4}}, nullptr, nullptr, nfl_mae},
        {"bi_tempered",
         {{0.8, 1.2, 0, 5},
          {0.8, 1.2, 0, 0},
          {0.5, 2, 0.1, 5},
          {0.2, 4, 0.1, 0},
          {0.7, 1, 0, 5},
          {1, 1, 0.1, 0},
          {0.5, 0.7, 0, 5},
          {0.5, 0.7, 0.1, 0},
          {0, 0.5, 0.2, 5}},
         nullptr,
         nullptr,
         naive_bi_tempered},
        {"hem", {{0.25, 0}, {1, 1}, {0, 0}}, nullptr, nullptr, naive_hem},
        {"multi_margin", {{1, 0, 0, 1}, {0.25, 1, 0, 1}, {0.25, 0, 1, 1}, {1, 1, 1, 1}, {1, 0, 0, 2}}, nullptr, nullptr, naive_multi_margin},
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

// Normalised over the labels: not defined for a single class.
inline bool needs_two_classes(std::string_view name) {
    return name.substr(0, 3) == "nce" || name.substr(0, 3) == "nfl" || name == "ngce";
}

inline bool is_margin_loss(std::string_view name) { return name == "hem" || name == "multi_margin"; }

// How much larger than the rounding of p_y that of the float formula may be: js divides by about pi, aue by a - p.
inline double condition(const NaiveLoss& loss, const double* params) {
    if (loss.name == std::string_view("js")) return 1 / params[0];
    if (loss.name == std::string_view("aue")) return std::fmax(1, 1 / (params[0] - 1));
    return 1;
}

inline NaiveResult naive_row(const NaiveLoss& loss, const double* params, const NaiveRow& row) {
    if (loss.row == naive_cross_entropy || !row.soft.empty()) return naive_cross_entropy(row, params);
    const auto of_p = [&] {
        const Real t = log_softmax(row)[row.y], p = std::exp(t);
        return of_target(row, loss.value(p, t, params), loss.w(p, t, params));
    };
    NaiveResult result = loss.row ? loss.row(row, params) : of_p();
    result.scale(row.weight_of(row.y));
    return result;
}

}  // namespace fused_losses_test
