// The parts of naive_losses.h that take more than a line: formulas of p_y, sums of losses, and numbers worked by hand.
#pragma once

#include "naive_rows.h"

namespace fused_losses_test {

inline Real taylor(Real p, int order) {
    Real sum = 0;
    for (int k = 1; k <= order; ++k) sum += pow(1 - p, Real(k)) / k;
    return sum;
}

inline Real jensen_shannon(Real p, Real t, Real pi) {
    const Real m = pi + (1 - pi) * p, h = -(1 - pi) * log(1 - pi);
    const Real cross = p == 0 ? Real(0) : p * (t - log(m));
    return (-pi * log(m) + (1 - pi) * cross - (1 - pi) * (1 - p) * log(1 - pi)) / h;
}

inline Real jensen_shannon_w(Real p, Real t, Real pi) {
    const Real m = pi + (1 - pi) * p, h = -(1 - pi) * log(1 - pi);
    return p == 0 ? Real(0) : -((1 - pi) * p / h) * (log(1 - pi) + t - log(m));
}

inline Real focal_w(Real p, Real t, Real gamma) {
    if (p == 1) return gamma == 0 ? 1 : 0;
    return pow(1 - p, gamma) + (p == 0 ? 0 : gamma * p * pow(1 - p, gamma - 1) * -t);
}

// (x^q - y^q) / q; for q = 1e-15 the difference would leave nothing of 34 digits.
inline Real power_gap(Real x, Real y, Real q) {
    const Real of_log = q * log(x / y);
    return (of_log < 1 ? pow(y, q) * expm1(of_log) : pow(x, q) - pow(y, q)) / q;
}

inline Real agce(Real p, const double* a) { return power_gap(Real(a[0]) + 1, a[0] + p, a[1]); }

inline Real agce_w(Real p, const double* a) { return p * pow(a[0] + p, Real(a[1]) - 1); }

inline Real aue(Real p, const double* a) { return power_gap(a[0] - p, Real(a[0]) - 1, a[1]); }

inline Real aue_w(Real p, const double* a) { return p * pow(a[0] - p, Real(a[1]) - 1); }

// value = phi(p_y), grad_j = w (p_j - [j = y])
inline NaiveResult of_target(const NaiveRow& row, Real value, Real w) {
    NaiveResult result{value, fabs(w)};
    const std::vector<Real> log_p = log_softmax(row);
    for (int j = 0; j < row.classes(); ++j) result.grad.push_back(w * (exp(log_p[j]) - (j == row.y)));
    return result;
}

// alpha active + beta passive. Without a share in the sum what is not finite does not count.
inline NaiveResult sum_of(const double* shares, NaiveResult active, const NaiveResult& passive) {
    for (Real& g : active.grad) g = shares[0] == 0 ? 0 : g;
    if (shares[0] == 0) active.value = active.magnitude = 0;
    active.scale(shares[0]);
    if (shares[1] != 0) active.add(shares[1], passive);
    return active;
}

inline NaiveResult scaled_mae(const NaiveRow& row, Real scale) {
    const Real p = exp(log_softmax(row)[row.y]);
    return of_target(row, scale * (1 - p), scale * p);
}

inline NaiveResult nce_mae(const NaiveRow& row, const double* a) {
    return sum_of(a, naive_nce(row, a), scaled_mae(row, a[2]));
}

inline NaiveResult nfl_mae(const NaiveRow& row, const double* a) {
    return sum_of(a, naive_nfl(row, a + 2), scaled_mae(row, a[4]));
}

inline NaiveResult nce_agce(const NaiveRow& row, const double* a) {
    const Real p = exp(log_softmax(row)[row.y]);
    return sum_of(a, naive_nce(row, a), of_target(row, agce(p, a + 2), agce_w(p, a + 2)));
}

// p_y = 1/4, p_y = 0: what the sums below are made of.
inline constexpr double kInfinity = HUGE_VAL, kNaN = __builtin_nan("");
inline const double kLog2 = std::log(2.0), kLog3 = std::log(3.0), kLog4 = std::log(4.0), kLogA = std::log(1e4);
inline const double kHandNCE = kLog4 / (kLog4 + std::log(4.0 / 3));
inline const double kHandNFL =
    std::sqrt(0.75) * kLog4 / (std::sqrt(0.75) * kLog4 + std::sqrt(0.25) * std::log(4.0 / 3));
inline const double kThird = 1 / (1 + std::exp(1.0));  // the probabilities of logits (-inf, 0, 1) are 0, this, the rest

// The sum of power(p) over the classes of (-inf, 0, 1).
inline double sum_of_powers(double power) { return std::pow(kThird, power) + std::pow(1 - kThird, power); }

// Defaults t1 = 0.8, t2 = 1.2: exp_t2(x) = (1 - x / 5)^-5, log_t1(x) = 5 (x^(1/5) - 1). The maximum is log 3.
inline double bi_tempered_by_hand() {
    const auto total = [](double x) { return 1 + std::pow(1 - x / 5, -5); };
    double x = -kLog3;
    for (int i = 0; i < 5; ++i) x = -kLog3 * std::pow(total(x), -0.2);
    const double root = 5 * (std::pow(total(x), 0.2) - 1);  // -log_t2(1 / total)
    const double p = std::pow(1 + (kLog3 + root) / 5, -5), other = std::pow(1 + root / 5, -5);
    return 5 * (1 - std::pow(p, 0.2)) - (1 - std::pow(p, 1.2) - std::pow(other, 1.2)) / 1.2;
}

inline Real gce(Real p, Real q) { return (1 - pow(p, q)) / q; }

// GCE and below tau^(-1 / (1 - q)) its tangent.
inline Real phuber_gce(Real p, const double* a) {
    const Real q = a[0], tau = a[1], p0 = pow(tau, -1 / (1 - q));
    return p > p0 ? gce(p, q) : gce(p0, q) + tau * (p0 - p);
}

inline NaiveResult nce_aue(const NaiveRow& row, const double* a) {
    const Real p = exp(log_softmax(row)[row.y]);
    return sum_of(a, naive_nce(row, a), of_target(row, aue(p, a + 2), aue_w(p, a + 2)));
}

// alpha times the focal loss of p' = (p_y + m [y is the arg-max]) / (m + 1), at least 1e-8, and beta 2 (1 - p_y).
inline NaiveResult eps_focal_mae(const NaiveRow& row, Real alpha, Real beta, Real m, Real gamma) {
    const Real p = exp(log_softmax(row)[row.y]);
    const bool is_top = row.logits[row.y] >= *std::max_element(row.logits.begin(), row.logits.end());
    const Real moved = (p + (is_top ? m : 0)) / (m + 1), least = 1e-8L, eps_p = fmax(moved, least);
    // 1 - p' of the arg-max, whose digits the difference would lose
    const Real miss = is_top ? (1 - p) / (m + 1) : 1 - eps_p, log_p = is_top ? log1p(-miss) : log(eps_p);
    const Real factor = gamma == 0 ? 1 : pow(miss, gamma);
    const Real of_factor = gamma == 0 || miss == 0 ? 0 : gamma * factor / miss * log_p;
    const Real slope = moved < least ? 0 : (of_factor - factor / eps_p) * p / (m + 1);
    return of_target(row, -alpha * factor * log_p + beta * 2 * (1 - p), -alpha * slope + beta * 2 * p);
}

// -log p_y + beta mean log p_j
inline NaiveResult cores(const NaiveRow& row, Real beta) {
    const std::vector<Real> log_p = log_softmax(row);
    const int classes = row.classes();
    NaiveResult result{-log_p[row.y], 1 + fabs(1 - beta)};
    for (int j = 0; j < classes; ++j) {
        if (beta != 0) result.value += beta * log_p[j] / classes;
        result.grad.push_back((1 - beta) * exp(log_p[j]) - (j == row.y) + beta / classes);
    }
    return result;
}

// alpha NFL(gamma, detach) + beta times the other.
inline NaiveResult nfl_and(const NaiveRow& row, const double* a, Real gamma, Real detach, const NaiveResult& other) {
    const double of_nfl[] = {double(gamma), double(detach)};
    return sum_of(a, naive_nfl(row, of_nfl), other);
}

inline NaiveResult anl(const NaiveRow& row, const double* a, double gamma, double detach, double min_prob) {
    const double of_nnfl[] = {gamma, detach, min_prob};
    return nfl_and(row, a, gamma, detach, naive_nnfl(row, of_nnfl));
}

inline NaiveResult jal(const NaiveRow& row, const double* a, double gamma, double detach, double of_amse) {
    return nfl_and(row, a, gamma, detach, naive_amse(row, &of_amse));
}

// params: temperature, margin c. The log of the mean of exp((h_j + c [j != y]) / temperature) times it, less h_y; h_j
// is log(1 + e^z_j) over its mean.
inline NaiveResult ldr_kl(const NaiveRow& row, const double* a) {
    const Real temperature = a[0], margin = a[1];
    const int classes = row.classes();
    std::vector<Real> s, h, q;
    Real mean_s = 0, top = 0, sum = 0, mean_gh = 0;
    for (const Real z : row.logits) s.push_back(fmax(z, Real(0)) + log1p(exp(-fabs(z)))), mean_s += s.back() / classes;
    for (int j = 0; j < classes; ++j) h.push_back(s[j] / mean_s), top = fmax(top, h[j] + margin);
    for (int j = 0; j < classes; ++j) q.push_back(exp((h[j] + (j == row.y ? 0 : margin) - top) / temperature));
    for (const Real x : q) sum += x;
    NaiveResult result{top - h[row.y] + temperature * log(sum / classes)};
    for (int j = 0; j < classes; ++j) mean_gh += (q[j] / sum - (j == row.y)) * h[j] / classes;
    for (int j = 0; j < classes; ++j) {
        // The sigmoid over the mean; both may be tiny.
        const Real z = row.logits[j], slope = (z > 0 ? 1 : exp(z)) / (1 + exp(-fabs(z))) / mean_s;
        result.grad.push_back(slope * (q[j] / sum - (j == row.y) - mean_gh));
        // Rounding of h is multiplied by 1 / temperature.
        result.magnitude = fmax(result.magnitude, slope * (1 + fabs(mean_gh)) * (1 + top / temperature));
    }
    return result;
}

// NNCE by hand: A = 7 log 10 less -log p, of p = 1/4 and 3/4.
inline const double kHandNNCE = 1 - (7 * std::log(10.0) - kLog4) / (14 * std::log(10.0) - kLog4 - std::log(4.0 / 3));
// NNFL with gamma = 1/2.
inline double nnfl_by_hand() {
    const double largest = std::sqrt(1 - 1e-7) * 7 * std::log(10.0), own = std::sqrt(0.75) * kLog4;
    return 1 - (largest - own) / (2 * largest - own - std::sqrt(0.25) * std::log(4.0 / 3));
}
inline const double kHandAMSE = (29.75 * 29.75 + 0.75 * 0.75) / 2, kAMSEAtZero = (900 + sum_of_powers(2)) / 3;
// LDR-KL by hand: log(1 + e^z) of (0, log 3) is log 2 times (1, 2), of (-inf, 0, 1) it is 0, log 2, log(1 + e).
inline const double kHandLDR = std::log((1 + std::exp(2.0 / 3 + 0.1)) / 2);
inline double ldr_kl_at_zero() {
    const double one = std::log(1 + std::exp(1.0)), mean = (kLog2 + one) / 3;
    return std::log((1 + std::exp(kLog2 / mean + 0.1) + std::exp(one / mean + 0.1)) / 3);
}
// At p_y = 0 the numerator of NNCE's quotient is 0, that of NNFL is what (1 - p)^gamma changes.
inline double nnfl_at_zero() {
    const double least = 7 * std::log(10.0), largest = std::sqrt(1 - 1e-7) * least;
    const double n = std::sqrt(1 - kThird) * -std::log(kThird), m = std::sqrt(kThird) * -std::log(1 - kThird);
    return 1 - (largest - least) / (3 * largest - least - n - m);
}

}  // namespace fused_losses_test
