// Losses that look at the whole row, straight from their published formulas: in long double, without a thought for
// speed or cancellation, and sharing no code with csrc/losses.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "naive_real.h"

namespace fused_losses_test {

// One row: logits with the bias already on the target's, label y, class weights, soft target and margins (or empty).
struct NaiveRow {
    std::vector<Real> logits;
    int y = 0;
    std::vector<double> weight, soft, margin = {};

    int classes() const { return static_cast<int>(logits.size()); }
    double weight_of(int j) const { return weight.empty() ? 1.0 : weight[j]; }
};

struct NaiveResult {
    Real value = 0;
    Real magnitude = 0;  // of the terms that make up a gradient entry, for a tolerance
    std::vector<Real> grad = {};

    void scale(Real by) {
        value *= by, magnitude *= fabs(by);
        for (Real& g : grad) g *= by;
    }
    void add(Real by, const NaiveResult& other) {
        value += by * other.value, magnitude += fabs(by) * other.magnitude;
        for (std::size_t j = 0; j < grad.size(); ++j) grad[j] += by * other.grad[j];
    }
};

inline std::vector<Real> log_softmax(const NaiveRow& row) {
    const Real max = *std::max_element(row.logits.begin(), row.logits.end());
    Real sum = 0;
    for (const Real z : row.logits) sum += exp(z - max);
    std::vector<Real> log_p;
    for (const Real z : row.logits) log_p.push_back(z - max - log(sum));
    return log_p;
}

// Cross entropy against the distribution q, which a hard label makes one-hot: torch weighs the label's term by the
// label's weight and the smoothing by each class's.
inline NaiveResult naive_cross_entropy(const NaiveRow& row, const double* params) {
    const std::vector<Real> log_p = log_softmax(row);
    const int classes = row.classes();
    const Real s = params[0];
    NaiveResult result;
    Real total = 0;
    std::vector<Real> u;
    for (int j = 0; j < classes; ++j) {
        const Real q = row.soft.empty() ? Real(j == row.y) : Real(row.soft[j]);
        u.push_back(row.weight_of(j) * ((1 - s) * q + s / classes));
        total += u[j];
        if (u[j] != 0) result.value -= u[j] * log_p[j];
        result.magnitude = fmax(result.magnitude, fabs(u[j]));
    }
    for (int j = 0; j < classes; ++j) result.grad.push_back(total * exp(log_p[j]) - u[j]);
    result.magnitude += fabs(total);
    return result;
}

// ---- Normalised over the labels: n_y / sum_j n_j -------------------------------------------------------------------

// n_j of one class and W_j = -dn_j / dlog p_j.
struct NaiveShare {
    Real n, w;
};

// grad_j = (W_y (p_j - [j = y]) - L (p_j sum W - W_j)) / sum n
template <class ShareOf>
NaiveResult naive_normalized(const NaiveRow& row, ShareOf share_of) {
    const std::vector<Real> log_p = log_softmax(row);
    std::vector<NaiveShare> shares;
    Real sum_n = 0, sum_w = 0;
    for (const Real t : log_p) {
        shares.push_back(share_of(t));
        sum_n += shares.back().n, sum_w += shares.back().w;
    }
    const Real own = shares[row.y].w, loss = shares[row.y].n / sum_n;
    NaiveResult result{loss, (fabs(own) + loss * fabs(sum_w)) / sum_n};
    for (int j = 0; j < row.classes(); ++j) {
        const Real p = exp(log_p[j]);
        result.grad.push_back((own * (p - (j == row.y)) - loss * (p * sum_w - shares[j].w)) / sum_n);
    }
    return result;
}

inline NaiveResult naive_nce(const NaiveRow& row, const double*) {
    return naive_normalized(row, [](Real t) { return NaiveShare{-t, 1}; });
}

// params: gamma, detach. At p = 1 both terms of W vanish for gamma > 0.
inline NaiveResult naive_nfl(const NaiveRow& row, const double* params) {
    const Real gamma = params[0];
    return naive_normalized(row, [=](Real t) {
        const Real miss = -expm1(t), factor = pow(miss, gamma);
        const bool exact = params[1] == 0 && miss > 0;
        return NaiveShare{-factor * t, factor + (exact ? gamma * exp(t) * factor / miss * -t : 0)};
    });
}

inline NaiveResult naive_ngce(const NaiveRow& row, const double* params) {
    const Real q = params[0];
    return naive_normalized(row, [=](Real t) { return NaiveShare{1 - exp(q * t), q * exp(q * t)}; });
}

// params: gamma, detach, min_prob. 1 - (A - n_y) / sum_k (A - n_k), n_k = -(1 - p_k)^gamma max(log p_k, log min_prob)
// and A its value at p = min_prob.
inline NaiveResult naive_nnfl(const NaiveRow& row, const double* params) {
    const Real gamma = params[0], least = log(Real(params[2])), largest = pow(1 - Real(params[2]), gamma) * -least;
    const std::vector<Real> log_p = log_softmax(row);
    std::vector<Real> n, w;  // w_k = -dn_k / dlog p_k
    Real sum = 0, sum_w = 0;
    for (const Real t : log_p) {
        const Real miss = -expm1(t), factor = pow(miss, gamma), clamped = fmax(t, least);
        const bool exact = params[1] == 0 && miss > 0;
        n.push_back(-factor * clamped);
        w.push_back((t < least ? 0 : factor) - (exact ? gamma * exp(t) * factor / miss * clamped : 0));
        sum += largest - n.back(), sum_w += w.back();
    }
    const Real ratio = (largest - n[row.y]) / sum;
    NaiveResult result{1 - ratio, (fabs(w[row.y]) + ratio * fabs(sum_w)) / sum};
    for (int j = 0; j < row.classes(); ++j)
        result.grad.push_back((-w[row.y] * ((j == row.y) - exp(log_p[j])) + ratio * (w[j] - sum_w * exp(log_p[j]))) /
                              sum);
    return result;
}

// ---- Powers of the probabilities -----------------------------------------------------------------------------------

// params: q. (mean_k p_k^q - p_y^q) / q
inline NaiveResult naive_sgce(const NaiveRow& row, const double* params) {
    const Real q = params[0];
    const std::vector<Real> log_p = log_softmax(row);
    const int classes = row.classes();
    const Real own = exp(q * log_p[row.y]);
    Real sum = 0;
    for (const Real t : log_p) sum += exp(q * t);
    NaiveResult result{(sum / classes - own) / q, 1 / q};
    for (int j = 0; j < classes; ++j) {
        const Real p = exp(log_p[j]);
        result.grad.push_back((exp(q * log_p[j]) - p * sum) / classes - own * ((j == row.y) - p));
    }
    return result;
}

// params: a. mean_k (a [k = y] - p_k)^2
inline NaiveResult naive_amse(const NaiveRow& row, const double* params) {
    const Real a = params[0];
    const std::vector<Real> log_p = log_softmax(row);
    const int classes = row.classes();
    Real squares = 0;
    NaiveResult result;
    for (int k = 0; k < classes; ++k) {
        const Real p = exp(log_p[k]), off = (k == row.y ? a : 0) - p;
        squares += p * p;
        result.value += off * off / classes;
    }
    const Real p_y = exp(log_p[row.y]);
    result.magnitude = 4 * (a + 1) / classes;
    for (int j = 0; j < classes; ++j) {
        const Real p = exp(log_p[j]);
        result.grad.push_back(2 * p * (p - (j == row.y ? a : 0) - squares + a * p_y) / classes);
    }
    return result;
}

// ---- Bi-tempered logistic ------------------------------------------------------------------------------------------

inline Real log_t(Real x, Real t) { return t == 1 ? log(x) : (pow(x, 1 - t) - 1) / (1 - t); }

inline Real exp_t(Real x, Real t) {
    if (t == 1) return exp(x);
    const Real base = 1 + (1 - t) * x;
    return base <= 0 ? 0 : pow(base, 1 / (1 - t));
}

// sum_j exp_t(scale x_j - root)
inline Real sum_exp_t(const std::vector<Real>& x, Real t, Real scale, Real root) {
    Real sum = 0;
    for (const Real v : x) sum += exp_t(scale * v - root, t);
    return sum;
}

// lambda - max as the authors' code finds it in so many iterations; x = z - max.
inline Real tempered_root(const std::vector<Real>& x, Real t, int iterations) {
    if (t > 1) {
        Real scale = 1;
        for (int i = 0; i < iterations; ++i) scale = pow(sum_exp_t(x, t, scale, 0), 1 - t);
        return -log_t(1 / sum_exp_t(x, t, scale, 0), t);
    }
    const auto inside = std::count_if(x.begin(), x.end(), [=](Real v) { return v > -1 / (1 - t); });
    Real lower = 0, upper = -log_t(1 / Real(inside), t);
    for (int i = 0; i < iterations; ++i) {
        const Real middle = (lower + upper) / 2;
        (sum_exp_t(x, t, 1, middle) < 1 ? upper : lower) = middle;
    }
    return (lower + upper) / 2;
}

// lambda - max to rounding. The sum is convex and falls with the root: Newton's method from the left never overshoots.
inline Real exact_tempered_root(const std::vector<Real>& x, Real t) {
    if (t == 1) return log(sum_exp_t(x, t, 1, 0));
    Real root = 0;
    for (int i = 0; i < 500; ++i) {
        Real sum = 0, slope = 0;
        for (const Real v : x) {
            const Real p = exp_t(v - root, t);
            sum += p, slope += p > 0 ? pow(p, t) : 0;
        }
        const Real step = (sum - 1) / slope;
        root += step;
        if (step < 1e-17L * (1 + root)) break;
    }
    return root;
}

// params: t1, t2, label smoothing, iterations (0: exact). The gradient is the published one, which takes p as
// normalised. The authors add 1e-10 to the labels inside log_t1; here 0 log 0 = 0. A class of probability 0 outside
// the support of exp_t2 stays there: it has no gradient.
inline NaiveResult naive_bi_tempered(const NaiveRow& row, const double* params) {
    const Real t1 = params[0], t2 = params[1], s = params[2];
    const int classes = row.classes(), iterations = static_cast<int>(params[3]);
    const Real max = *std::max_element(row.logits.begin(), row.logits.end());
    std::vector<Real> x;
    for (const Real z : row.logits) x.push_back(z - max);
    const Real root = t2 == 1 || iterations == 0 ? exact_tempered_root(x, t2) : tempered_root(x, t2, iterations);
    NaiveResult result;
    std::vector<Real> d, escort;
    Real sum_d = 0, sum_escort = 0;
    for (int j = 0; j < classes; ++j) {
        const Real p = exp_t(x[j] - root, t2), y = j == row.y ? 1 - s : s / (classes - 1);
        if (y > 0) result.value += y * (log_t(y, t1) - log_t(p, t1));
        result.value -= (pow(y, 2 - t1) - pow(p, 2 - t1)) / (2 - t1);
        d.push_back(p > 0 ? (p - y) * pow(p, t2 - t1) : 0);
        escort.push_back(p > 0 ? pow(p, t2) : 0);
        sum_d += d[j], sum_escort += escort[j];
        result.magnitude = fmax(result.magnitude, fabs(d[j]));
    }
    for (int j = 0; j < classes; ++j) result.grad.push_back(d[j] - escort[j] / sum_escort * sum_d);
    return result;
}

// ---- Margins -------------------------------------------------------------------------------------------------------

// Errors e_j = max(0, z_j - z_y + margin), e_y = 0, of which those at or above the threshold count; the sum of their
// powers over K or over their number. Threshold and number are constants for the gradient.
inline NaiveResult naive_margin(const NaiveRow& row, double margin, bool of_competitor, bool by_count,
                                bool with_threshold, double power = 1) {
    const int classes = row.classes();
    std::vector<Real> e;
    Real mean = 0;
    for (int j = 0; j < classes; ++j) {
        const Real mu = row.margin.empty() ? margin : row.margin[of_competitor ? j : row.y];
        e.push_back(j == row.y ? 0 : fmax(Real(0), row.logits[j] - (row.logits[row.y] - mu)));
        mean += e[j];
    }
    mean /= classes;
    Real sum = 0, slopes = 0, count = 0;
    const auto kept = [&](int j) { return e[j] > 0 && (!with_threshold || e[j] >= mean); };
    for (int j = 0; j < classes; ++j)
        if (kept(j)) sum += power == 2 ? e[j] * e[j] : e[j], slopes += power == 2 ? 2 * e[j] : 1, count += 1;
    const Real per_error = 1 / (by_count ? count + 1e-6L : Real(classes));
    NaiveResult result{sum * per_error, slopes * per_error};
    for (int j = 0; j < classes; ++j)
        result.grad.push_back(per_error * (j == row.y ? -slopes : (kept(j) ? (power == 2 ? 2 * e[j] : 1) : 0)));
    return result;
}

// params: margin, margin_index
inline NaiveResult naive_hem(const NaiveRow& row, const double* a) {
    return naive_margin(row, a[0], a[1] != 0, true, true);
}

// params: margin, mean_above_zero, threshold, p
inline NaiveResult naive_multi_margin(const NaiveRow& row, const double* a) {
    return naive_margin(row, a[0], false, a[1] != 0, a[2] != 0, a[3]);
}

}  // namespace fused_losses_test
