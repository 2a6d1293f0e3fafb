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
    const T entropy = math::log(sum) - weighted / sum;
    return {{log_p, top_e / sum, top, margin, math::select(entropy < T(0), T(0), entropy)}};
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
        second = Traits::select(above, top, Traits::select(z > second, z, second));
        index = Traits::select(above, cls, index);
        top = Traits::select(above, z, top);
    }

    FL_HD void add(T z) {
        const T below = z - top, e = math::exp_not_positive(below);
        sum += e;
        weighted += Traits::select(e == T(0), T(0), e * below);
    }

    // In one pass: scalars only.
    FL_HD void push(T z, I cls) {
        if (z > top) {
            second = top, index = cls;
            rescale(z);
        } else if (z > second) {
            second = z;
        }
        if (!(z == none().top)) add(z);  // NaN is added
    }

    FL_HD void merge(const RowSummary& other) {
        RowSummary theirs = other;
        const bool is_theirs = other.top > top || (other.top == top && other.index < index);
        const T lower = is_theirs ? top : other.top, next = is_theirs ? other.second : second;
        if (other.top > top) rescale(other.top);
        if (top > other.top) theirs.rescale(top);
        second = lower > next ? lower : next;
        index = is_theirs ? other.index : index;
        sum += theirs.sum;
        weighted += theirs.weighted;
    }

    // Where `sum` is a positive number. Otherwise see leave_undefined().
    FL_HD RowStatisticsOf<T> finish(T target_logit, I target) const {
        const T margin = target_logit - Traits::select(index == target, second, top);
        return row_statistics_of((target_logit - top) - math::log(sum), T(1), top, margin, sum, weighted);
    }

private:
    // Makes `new_top` what exponentials are relative to.
    FL_HD void rescale(T new_top) {
        const T difference = top - new_top, factor = math::exp_not_positive(difference);
        weighted = sum == T(0) ? T(0) : factor * (weighted + difference * sum);
        sum = sum == T(0) ? T(0) : factor * sum;
        top = new_top;
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
