// Row statistics by sums in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/row_statistics.h"

namespace fused_losses_test {

using fused_losses::kRowStatistics;

struct NaiveStatistics {
    double v[kRowStatistics];
    std::int64_t argmax = 0;
};

inline NaiveStatistics statistics_of(const std::vector<double>& z, std::int64_t target, bool ignored) {
    NaiveStatistics e{};
    double top = -HUGE_VAL, other = -HUGE_VAL, sum = 0, entropy = 0;
    bool has_nan = false;
    for (std::int64_t c = 0; c < std::int64_t(z.size()); ++c) {
        if (!has_nan && (z[c] > top || std::isnan(z[c]))) e.argmax = c, top = z[c];
        has_nan |= std::isnan(z[c]);
        if (c != target && z[c] > other) other = z[c];
    }
    for (const double x : z) sum += std::exp(x - top);
    for (const double x : z) {
        const double log_p = (x - top) - std::log(sum), p = std::exp(log_p);
        entropy -= p == 0 ? 0 : p * log_p;
    }
    const double values[] = {(z[target] - top) - std::log(sum), 1 / sum, top,
                             has_nan ? std::nan("") : z[target] - other, entropy};
    for (int k = 0; k < kRowStatistics; ++k) e.v[k] = ignored ? std::nan("") : values[k];
    return e;
}

inline bool close(double a, double b, double tolerance) {
    if (std::isnan(b) || std::isinf(b)) return std::isnan(b) ? std::isnan(a) : a == b;
    return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
}

}  // namespace fused_losses_test
