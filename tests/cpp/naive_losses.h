// Every loss once more, straight from its published formula: in long double, without a thought for speed or
// cancellation, and sharing no code with csrc/losses. Each loss has one row here, which is all that tests know of it:
// the Python tests read it through naive_library.cpp.
#pragma once

#include <cmath>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "check.h"
#include "naive_formulas.h"

namespace fused_losses_test {

using Params = std::vector<double>;

// A function of p_y, or of what else it needs.
using NaiveFunction = Real (*)(Real p, Real t, const double* a);

struct NaiveLoss {
    const char* name;
    double hand_worked;          // with default parameters, at p_y = 1/4: logits (0, log 3), label 0
    double at_zero;              // the same at p_y = 0: logits (-inf, 0, 1), label 0
    std::vector<Params> params;  // the sets to test
    // phi(p_y) and w = -dphi/dt, t = log p_y; or, where a loss looks at the whole row, that (class weights left out,
    // but for cross entropy).
    NaiveFunction value = nullptr, w = nullptr;
    NaiveResult (*row)(const NaiveRow&, const double* a) = nullptr;
    bool masks = true;                                 // whether the value is finite with another class at -inf
    bool (*masks_with)(const double* a) = nullptr;     // ... and if so with which parameters; null: any
    bool (*is_derivative)(const double* a) = nullptr;  // whether the gradient is that of the value; null: always
    double (*class_kink)(const double* a) = nullptr;   // the log p_j at which the term of any class bends
    double (*kink)(const double* a) = nullptr;         // the t at which the slope jumps or bends
    double (*condition)(const double* a) = nullptr;  // how much larger than the rounding of p_y the float formula's is
};

inline const std::vector<NaiveLoss>& naive_losses() {
    static const std::vector<NaiveLoss> losses = {
        {.name = "cross_entropy",
         .hand_worked = kLog4,
         .at_zero = kInfinity,
         .params = {{0.0}, {0.1}, {0.5}, {1.0}, {-2.0}},
         .row = naive_cross_entropy},
        {.name = "mae",
         .hand_worked = 1.5,
         .at_zero = 2,
         .params = {{2.0}, {1.0}},
         .value = [](Real p, Real, const double* a) { return a[0] * (1 - p); },
         .w = [](Real p, Real, const double* a) { return a[0] * p; }},
        {.name = "gce",
         .hand_worked = (1 - std::pow(0.25, 0.7)) / 0.7,
         .at_zero = 1 / 0.7,
         .params = {{0.7}, {1.0}, {0.1}, {1e-3}, {2.5}},
         .value = [](Real p, Real, const double* a) { return (1 - pow(p, Real(a[0]))) / a[0]; },
         .w = [](Real p, Real, const double* a) { return pow(p, Real(a[0])); }},
        {.name = "agce",
         .hand_worked = (std::pow(1.6, 0.6) - std::pow(0.85, 0.6)) / 0.6,
         .at_zero = (std::pow(1.6, 0.6) - std::pow(0.6, 0.6)) / 0.6,
         .params = {{0.6, 0.6}, {4.0, 0.2}, {6.0, 1.5}, {1.8, 3.0}, {0.1, 1e-3}, {1e-6, 0.6}},
         .value = [](Real p, Real, const double* a) { return agce(p, a); },
         .w = [](Real p, Real, const double* a) { return agce_w(p, a); }},
        {.name = "aue",
         .hand_worked = (std::pow(5.25, 3) - std::pow(4.5, 3)) / 3,
         .at_zero = (std::pow(5.5, 3) - std::pow(4.5, 3)) / 3,
         .params = {{5.5, 3.0}, {3.0, 0.1}, {1.5, 0.9}, {1.01, 0.5}, {1.01, 20}},
         .value = [](Real p, Real, const double* a) { return aue(p, a); },
         .w = [](Real p, Real, const double* a) { return aue_w(p, a); },
         .condition = [](const double* a) { return std::fmax(1, 1 / (a[0] - 1)); }},
        {.name = "ae",
         .hand_worked = std::exp(-0.1),
         .at_zero = 1,
         .params = {{2.5}, {0.2}},
         .value = [](Real p, Real, const double* a) { return exp(-p / a[0]); },
         .w = [](Real p, Real, const double* a) { return p / a[0] * exp(-p / a[0]); }},
        {.name = "rce",
         .hand_worked = 0.75 * kLogA,
         .at_zero = kLogA,
         .params = {{9.210340371976182}, {4.0}},
         .value = [](Real p, Real, const double* a) { return a[0] * (1 - p); },
         .w = [](Real p, Real, const double* a) { return a[0] * p; }},
        {.name = "sce",
         .hand_worked = 0.1 * kLog4 + 0.75 * kLogA,
         .at_zero = kInfinity,
         .params = {{0.1, 1.0, 9.210340371976182}, {6.0, 0.1, 9.210340371976182}, {0.0, 1.0, 4.0}, {1.0, 0.0, 4.0}},
         .value = [](Real p, Real t, const double* a) { return (a[0] == 0 ? 0 : -a[0] * t) + a[1] * a[2] * (1 - p); },
         .w = [](Real p, Real, const double* a) { return a[0] + a[1] * a[2] * p; }},
        {.name = "taylor_ce",
         .hand_worked = 0.75 + 0.75 * 0.75 / 2,
         .at_zero = 1.5,
         .params = {{1.0}, {2.0}, {6.0}, {30.0}},
         .value = [](Real p, Real, const double* a) { return taylor(p, int(a[0])); },
         .w = [](Real p, Real, const double* a) { return 1 - pow(1 - p, Real(a[0])); }},
        {.name = "phuber_ce",
         .hand_worked = kLog4,
         .at_zero = 1 + std::log(10.0),
         .params = {{10.0}, {2.0}, {1.25}},
         .value = [](Real p, Real t,
                     const double* a) { return p > 1 / Real(a[0]) ? -t : 1 + log(Real(a[0])) - a[0] * p; },
         .w = [](Real p, Real, const double* a) { return fmin(Real(1), a[0] * p); },
         .kink = [](const double* a) { return -std::log(a[0]); }},
        {.name = "js",
         .hand_worked = (-0.5 * std::log(0.625) + 0.125 * std::log(0.4) + 0.375 * kLog2) / (0.5 * kLog2),
         .at_zero = 2,
         .params = {{0.5}, {0.1}, {0.9}, {1e-3}, {1e-6}},
         .value = [](Real p, Real t, const double* a) { return jensen_shannon(p, t, a[0]); },
         .w = [](Real p, Real t, const double* a) { return jensen_shannon_w(p, t, a[0]); },
         .condition = [](const double* a) { return 1 / a[0]; }},
        {.name = "focal",
         .hand_worked = 0.5625 * kLog4,
         .at_zero = kInfinity,
         .params = {{2.0}, {0.0}, {0.5}, {5.0}},
         .value = [](Real p, Real t, const double* a) { return p == 1 ? 0 : -pow(1 - p, Real(a[0])) * t; },
         .w = [](Real p, Real t, const double* a) { return focal_w(p, t, a[0]); }},
        {.name = "bounded_ce",
         .hand_worked = std::log(1.1 / 0.35),
         .at_zero = std::log(11.0),
         .params = {{0.1}, {2.0}},
         .value = [](Real p, Real, const double* a) { return log((1 + Real(a[0])) / (p + a[0])); },
         .w = [](Real p, Real, const double* a) { return p / (p + a[0]); }},
        {.name = "poly",
         .hand_worked = kLog4 + 2 * 0.75,
         .at_zero = kInfinity,
         .params = {{2.0}, {-1.0}, {0.0}},
         .value = [](Real p, Real t, const double* a) { return -t + a[0] * (1 - p); },
         .w = [](Real p, Real, const double* a) { return 1 + a[0] * p; }},
        {.name = "phuber_gce",
         .hand_worked = (1 - std::pow(0.25, 0.7)) / 0.7,
         .at_zero = (1 + 0.7 * std::pow(10, -0.7 / 0.3) - std::pow(10, -0.7 / 0.3)) / 0.7,
         .params = {{0.7, 10}, {0.5, 1.5}, {0.1, 100}, {0.9, 2}},
         .value = [](Real p, Real, const double* a) { return phuber_gce(p, a); },
         .w = [](Real p, Real, const double* a) { return fmin(pow(p, Real(a[0])), a[1] * p); },
         .kink = [](const double* a) { return -std::log(a[1]) / (1 - a[0]); }},
        {.name = "truncated_gce",
         .hand_worked = (1 - std::pow(0.5, 0.7)) / 0.7,
         .at_zero = (1 - std::pow(0.5, 0.7)) / 0.7,
         .params = {{0.7, 0.5}, {0.3, 0.1}, {2, 0.01}},
         .value = [](Real p, Real, const double* a) { return fmin(gce(p, a[0]), gce(a[1], a[0])); },
         .w = [](Real p, Real, const double* a) { return p > a[1] ? pow(p, Real(a[0])) : 0; },
         .kink = [](const double* a) { return std::log(a[1]); }},
        {.name = "ece",
         .hand_worked = kLog4 + std::log(10001.0),
         .at_zero = -std::log(1e-8),
         .params = {{1e4}, {1}, {0.01}, {1e5}},
         .row = [](const NaiveRow& row, const double* a) { return eps_focal_mae(row, 1, 0, a[0], 0); }},
        {.name = "ece_mae",
         .hand_worked = 0.1 * (kLog4 + std::log(10001.0)) + 1.5,
         .at_zero = -0.1 * std::log(1e-8) + 2,
         .params = {{0.1, 1, 1e4}, {0.5, 0, 10}, {0, 2, 1e3}},
         .row = [](const NaiveRow& row, const double* a) { return eps_focal_mae(row, a[0], a[1], a[2], 0); }},
        {.name = "efl_mae",
         .hand_worked = 0.1 * std::pow(1 - 0.25 / 10001, 0.1) * (kLog4 + std::log(10001.0)) + 1.5,
         .at_zero = -0.1 * std::pow(1 - 1e-8, 0.1) * std::log(1e-8) + 2,
         .params = {{0.1, 1, 1e4, 0.1}, {1, 0.5, 10, 2}, {1, 0, 1, 0}},
         .row = [](const NaiveRow& row, const double* a) { return eps_focal_mae(row, a[0], a[1], a[2], a[3]); }},
        {.name = "cores",
         .hand_worked = kLog4 - (kLog4 + std::log(4.0 / 3)),
         .at_zero = kNaN,
         .params = {{2}, {0}, {0.5}, {1}},
         .row = [](const NaiveRow& row, const double* a) { return cores(row, a[0]); },
         .masks = false},
        {.name = "unhinged",
         .hand_worked = kLog3 / 2,
         .at_zero = kNaN,
         .params = {{}},
         .row = [](const NaiveRow& row, const double*) { return cores(row, 1); },
         .masks = false},
        {.name = "nce", .hand_worked = kHandNCE, .at_zero = kNaN, .params = {{}}, .row = naive_nce, .masks = false},
        {.name = "nce_mae",
         .hand_worked = kHandNCE + 0.75,
         .at_zero = kNaN,
         .params = {{1, 1, 1}, {10, 0.5, 2}, {0, 1, 2}},
         .row = nce_mae,
         .masks = false},
        {.name = "nce_rce",
         .hand_worked = kHandNCE + 0.75 * kLogA,
         .at_zero = kNaN,
         .params = {{1, 1, 9.210340371976182}, {10, 0.1, 4}, {0, 1, 4}},
         .row = nce_mae,
         .masks = false},
        {.name = "nce_agce",
         .hand_worked = kHandNCE + 4 * (std::pow(7, 1.5) - std::pow(6.25, 1.5)) / 1.5,
         .at_zero = kNaN,
         .params = {{1, 4, 6, 1.5}, {10, 0.1, 1.8, 3}, {0, 1, 4, 0.2}},
         .row = nce_agce,
         .masks = false},
        {.name = "nce_aue",
         .hand_worked = kHandNCE + 4 * (std::pow(6.05, 1.5) - std::pow(5.3, 1.5)) / 1.5,
         .at_zero = kNaN,
         .params = {{1, 4, 6.3, 1.5}, {10, 0.015, 6, 3}, {0, 1, 3, 0.1}},
         .row = nce_aue,
         .masks = false},
        {.name = "nfl",
         .hand_worked = kHandNFL,
         .at_zero = kNaN,
         .params = {{0.5, 1}, {0.5, 0}, {0, 0}, {2, 0}, {2, 1}},
         .row = naive_nfl,
         .masks = false,
         .is_derivative = [](const double* a) { return a[1] == 0; }},
        {.name = "ngce",
         .hand_worked = (1 - std::pow(0.25, 0.7)) / (2 - std::pow(0.25, 0.7) - std::pow(0.75, 0.7)),
         .at_zero = 1 / (3 - sum_of_powers(0.7)),
         .params = {{0.7}, {0.1}, {1.5}, {1e-5}},
         .row = naive_ngce},
        {.name = "nfl_mae",
         .hand_worked = kHandNFL + 0.75,
         .at_zero = kNaN,
         .params = {{1, 1, 0.5, 1, 1}, {10, 0.5, 1, 0, 2}, {0, 1, 0.5, 0, 2}},
         .row = nfl_mae,
         .masks = false,
         .is_derivative = [](const double* a) { return a[3] == 0 || a[0] == 0; }},
        {.name = "nfl_rce",
         .hand_worked = kHandNFL + 0.75 * kLogA,
         .at_zero = kNaN,
         .params = {{1, 1, 0.5, 1, 9.210340371976182}, {10, 0.1, 1, 0, 4}},
         .row = nfl_mae,
         .masks = false,
         .is_derivative = [](const double* a) { return a[3] == 0 || a[0] == 0; }},
        {.name = "sgce",
         .hand_worked = ((std::pow(0.25, 0.7) + std::pow(0.75, 0.7)) / 2 - std::pow(0.25, 0.7)) / 0.7,
         .at_zero = sum_of_powers(0.7) / 3 / 0.7,
         .params = {{0.7}, {0.1}, {1.5}, {1e-5}},
         .row = naive_sgce},
        {.name = "amse",
         .hand_worked = kHandAMSE,
         .at_zero = kAMSEAtZero,
         .params = {{30}, {1}, {0.5}},
         .row = naive_amse},
        {.name = "nnce",
         .hand_worked = kHandNNCE,
         .at_zero = 1,
         .params = {{1e-7}, {1e-3}},
         .row =
             [](const NaiveRow& row, const double* a) {
                 const double of_nnfl[] = {0, 1, a[0]};
                 return naive_nnfl(row, of_nnfl);
             },
         .class_kink = [](const double* a) { return std::log(a[0]); }},
        {.name = "anl_ce",
         .hand_worked = 5 * kHandNCE + 5 * kHandNNCE,
         .at_zero = kNaN,
         .params = {{5, 5, 1e-7}, {0, 1, 1e-3}, {10, 0, 1e-7}},
         .row = [](const NaiveRow& row, const double* a) { return anl(row, a, 0, 1, a[2]); },
         .masks = false,
         .class_kink = [](const double* a) { return std::log(a[2]); }},
        {.name = "nnfl",
         .hand_worked = nnfl_by_hand(),
         .at_zero = nnfl_at_zero(),
         .params = {{0.5, 1, 1e-7}, {0.5, 0, 1e-3}, {2, 0, 1e-7}, {0, 0, 1e-3}},
         .row = naive_nnfl,
         .is_derivative = [](const double* a) { return a[1] == 0; },
         .class_kink = [](const double* a) { return std::log(a[2]); }},
        {.name = "anl_fl",
         .hand_worked = 5 * kHandNFL + 5 * nnfl_by_hand(),
         .at_zero = kNaN,
         .params = {{5, 5, 0.5, 1, 1e-7}, {10, 1, 2, 0, 1e-3}, {0, 1, 0.5, 0, 1e-7}},
         .row = [](const NaiveRow& row, const double* a) { return anl(row, a, a[2], a[3], a[4]); },
         .masks = false,
         .is_derivative = [](const double* a) { return a[3] == 0; },
         .class_kink = [](const double* a) { return std::log(a[4]); }},
        {.name = "jal_ce",
         .hand_worked = kHandNCE + kHandAMSE,
         .at_zero = kNaN,
         .params = {{1, 1, 30}, {0, 2, 1}, {5, 0, 20}},
         .row = [](const NaiveRow& row, const double* a) { return jal(row, a, 0, 1, a[2]); },
         .masks = false},
        {.name = "jal_fl",
         .hand_worked = kHandNFL + kHandAMSE,
         .at_zero = kNaN,
         .params = {{1, 1, 0.5, 1, 30}, {5, 1, 2, 0, 20}, {0, 1, 0.5, 0, 1}},
         .row = [](const NaiveRow& row, const double* a) { return jal(row, a, a[2], a[3], a[4]); },
         .masks = false,
         .is_derivative = [](const double* a) { return a[3] == 0; }},
        {.name = "ldr_kl",
         .hand_worked = kHandLDR,
         .at_zero = ldr_kl_at_zero(),
         .params = {{1, 0.1}, {10, 0.1}, {0.1, 2}, {0.02, 2}, {1, 0}, {300, 5}},
         .row = ldr_kl},
        {.name = "bi_tempered",
         .hand_worked = bi_tempered_by_hand(),
         .at_zero = 5 - (1 - sum_of_powers(1.2)) / 1.2,  // with t2 = 1
         .params = {{0.8, 1.2, 0, 5},
                    {0.8, 1.2, 0.1, 5},
                    {0.5, 1.5, 0.1, 5},
                    {0.8, 1.2, 0, 0},
                    {0.5, 2, 0.1, 5},
                    {0.2, 4, 0.1, 0},
                    {0.7, 1, 0, 5},
                    {1, 1, 0.1, 0},
                    {0.5, 0.7, 0, 5},
                    {0.5, 0.7, 0.1, 0},
                    {0, 0.5, 0.2, 5}},
         .row = naive_bi_tempered,
         .masks_with = [](const double* a) { return a[0] < 1 || a[2] == 0; },
         .is_derivative = [](const double* a) { return a[1] == 1 || a[3] == 0; }},
        {.name = "hem",
         .hand_worked = (kLog3 + 0.2) / ((1 + 1e-6) * (1 + 1e-6)),  // one error, one active row
         .at_zero = kInfinity,
         .params = {{0.25, 0}, {1, 1}, {0, 0}},
         .row = naive_hem},
        {.name = "multi_margin",
         .hand_worked = (kLog3 + 1) / 2,
         .at_zero = kInfinity,
         .params = {{1, 0, 0, 1}, {0.25, 1, 0, 1}, {0.25, 0, 1, 1}, {1, 1, 1, 1}, {1, 0, 0, 2}},
         .row = naive_multi_margin},
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

inline double condition(const NaiveLoss& loss, const double* params) {
    return loss.condition ? loss.condition(params) : 1;
}

inline NaiveResult naive_row(const NaiveLoss& loss, const double* params, const NaiveRow& row);

// The sum of every class's loss times its share of a soft target.
inline NaiveResult naive_class_losses(const NaiveLoss& loss, const double* params, const NaiveRow& row) {
    NaiveResult sum;
    sum.grad.resize(row.logits.size());
    NaiveRow of_label = row;
    of_label.soft.clear();
    for (of_label.y = 0; of_label.y < row.classes(); ++of_label.y)
        if (row.soft[of_label.y] * row.weight_of(of_label.y) != 0)
            sum.add(row.soft[of_label.y], naive_row(loss, params, of_label));
    return sum;
}

inline NaiveResult naive_row(const NaiveLoss& loss, const double* params, const NaiveRow& row) {
    if (loss.row == naive_cross_entropy) return naive_cross_entropy(row, params);
    if (!row.soft.empty()) return naive_class_losses(loss, params, row);
    const auto of_p = [&] {
        const Real t = log_softmax(row)[row.y], p = exp(t);
        return of_target(row, loss.value(p, t, params), loss.w(p, t, params));
    };
    NaiveResult result = loss.row ? loss.row(row, params) : of_p();
    result.scale(row.weight_of(row.y));
    return result;
}

}  // namespace fused_losses_test
