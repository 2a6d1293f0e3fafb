// What one row of logits looks like: numbers for diagnostics, from one read of the row. Torch-free.
#pragma once

#include <limits>

#include "core/math.h"

namespace fused_losses {
inline namespace FL_ISA {

// In the order of RowProblem::row_statistics.
enum RowStatistic { kLogProb, kMaxProb, kMaxLogit, kMargin, kEntropy, kRowStatistics };

template <class T>
struct RowStatisticsOf {
    T v[kRowStatistics];
};

// From log p of the target, e and logit of the likeliest class, and the sums of RowSummary.
template <class T>
FL_HD RowStatisticsOf<T> row_statistics_of(T log_p, T top_e, T top, T margin, T sum, T weighted) {
    const T entropy = math::log(sum) - math::divide(weighted, sum);
    return {{log_p, math::divide(top_e, sum), top, margin, math::select(entropy < T(0), T(0), entropy)}};
}

// A reduction over classes. T is a float, a double, or a vector of them; I holds a class number.
template <class T, class I>
struct RowSummary {
    using Traits = math::Traits<T>;

    T top, second;    // the largest logit, and the largest of the others; NaN skipped
    I index;          // of the first class whose logit is the largest
    T sum, weighted;  // of e = exp(z - top), and of e (z - top)

    FL_HD static RowSummary none() {
        constexpr auto lowest = -std::numeric_limits<math::scalar_t<T>>::infinity();
        return {T(lowest), T(lowest), I(0), T(0), T(0)};
    }

    // In two passes: all classes are compared, in order, before their exponentials are added up.
    FL_HD void compare(T z, I cls) {
        const auto above = z > top;
        second = Traits::select(above, top, math::larger(z, second));
        index = Traits::select(above, cls, index);
        top = math::larger(z, top);
    }

    FL_HD void add(T z) { add_below(z - top); }

    // What lies so far below what exponentials are relative to.
    FL_HD void add_below(T below) {
        const T e = math::exp_not_positive(below);
        sum += e;
        weighted += math::times_exp(below, e);
    }

    // In one pass: scalars only. Some classes at once, each `step` after the other; beyond the row they are -inf.
    template <int n>
    FL_HD void push(const T (&z)[n], I first, I step) {
        const T before = top;
        const I index_before = index;
        index = I(-1);
        for (int k = 0; k < n; ++k) compare(z[k], I(k));
        index = index < I(0) ? index_before : first + index * step;
        move_to(pivot_of(top), before);
        for (int k = 0; k < n; ++k) add_below(z[k] - pivot_of(top));
    }

    // Makes `pivot`, the largest logit or a larger one, what exponentials are relative to; so far that was `before`.
    FL_HD void move_to(T pivot, T before) {
        const T below = before - pivot, difference = Traits::select(below < T(0), below, T(0));
        const T factor = math::exp_not_positive(difference);
        weighted = factor * weighted + math::times_exp(difference, factor) * sum;
        sum *= factor;
    }

    // -inf - -inf is NaN.
    FL_HD static T pivot_of(T top) { return Traits::select(top == none().top, T(0), top); }

    // Where `sum` is a positive number. Otherwise see leave_undefined().
    FL_HD RowStatisticsOf<T> finish(T target_logit, I target) const {
        const T margin = target_logit - Traits::select(index == target, second, top);
        return row_statistics_of((target_logit - top) - math::log(sum), T(1), top, margin, sum, weighted);
    }
};

// Of a row with NaN or +inf, or with nothing above -inf, which makes `sum` NaN or 0: there are no probabilities.
template <class T>
FL_HD void leave_undefined(RowStatisticsOf<T>& of, bool has_nan) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    of.v[kLogProb] = of.v[kMaxProb] = of.v[kEntropy] = nan;
    if (has_nan) of.v[kMaxLogit] = of.v[kMargin] = nan;
}

}  // namespace FL_ISA
}  // namespace fused_losses
