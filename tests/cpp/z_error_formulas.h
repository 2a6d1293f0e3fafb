// The published formulas of Z-Error in long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "z_error/problem.h"

namespace fused_losses_test {

using namespace fused_losses;

using Real = long double;

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What the formulas say about a row.
struct ZRow {
    std::int64_t group = -1;
    double score = kNaN;
    Real value = 0, weight = 0, slope = 0;  // if it is kept
};

struct ZMoments {
    Real count = 0, mean = 0, m2 = 0;
};

// Not a number, or infinite, where that is what comes out.
inline bool near(Real got, Real want, Real tolerance) {
    return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
}

inline Real log1pexp(Real x) { return std::fmax(x, Real(0)) + std::log1p(std::exp(-std::fabs(x))); }

// logit(c) of each class, the bias included.
template <class Logit>
Real cross_entropy(Logit logit, std::int64_t classes, std::int64_t own, Real smoothing) {
    Real sum = 0, all = 0;
    for (std::int64_t c = 0; c < classes; ++c) sum += std::exp(logit(c));
    const Real log_sum = std::log(sum);
    for (std::int64_t c = 0; c < classes; ++c) all += log_sum - logit(c);
    return (1 - smoothing) * (log_sum - logit(own)) + (smoothing == 0 ? 0 : smoothing / classes * all);
}

// Kept: 1, dropped: 0, too near the threshold to say: -1.
inline int verdict(const ZProblem& p, const std::vector<ZMoments>& moments, const ZRow& row, double limit, double& z) {
    z = kNaN;
    if (row.group < 0) return 0;
    if (!std::isfinite(row.score))  // where no row has a finite score, none is dropped
        return std::none_of(moments.begin(), moments.end(), [](const ZMoments& of) { return of.count > 0; });
    const ZMoments& m = moments[row.group];
    if (m.count < p.min_count || m.count < 2) return p.keep_small;
    Real std = std::sqrt(m.m2 / (m.count - 1));
    const bool constant = !is_regression(p.statistic) && std < 1e-8L;
    std = is_regression(p.statistic) ? std + 1e-8L : (constant ? 1 : std);
    z = double((row.score - m.mean) / std);
    if (constant) return 1;
    if (std::fabs(std::fabs(z) - limit) < 1e-6) return -1;
    const bool mirrored = is_binary(p.statistic) && row.group % 2 == 0;
    const double lower_side = mirrored ? -z : z;
    if (p.tail == Tail::kBoth) return std::fabs(z) < limit;
    return p.tail == Tail::kLow ? lower_side > -limit : lower_side < limit;
}

}  // namespace fused_losses_test
