// What a row is worth to a Z-Error loss: group, score, whether it is kept, loss and slope. The CPU
// (cpu/z_error_kernels.cpp) computes blocks of rows of this, CUDA (cuda/z_error_rows.cuh) one at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/math.h"
#include "core/numeric.h"
#include "z_error/moments.h"
#include "z_error/problem.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace z_error {

template <class T>
FL_HD math::mask_t<T> is_finite(T x) {
    return x - x == T(0.0);
}

// acc is double only for float64 inputs.
template <class A>
FL_HD void write(void* data, ElementType type, std::int64_t offset, A x) {
    switch (type) {
        case ElementType::kFloat64: static_cast<double*>(data)[offset] = static_cast<double>(x); break;
        case ElementType::kFloat16: static_cast<Half*>(data)[offset] = narrow<Half>(static_cast<float>(x)); break;
        case ElementType::kBFloat16:
            static_cast<BFloat16*>(data)[offset] = narrow<BFloat16>(static_cast<float>(x));
            break;
        default: static_cast<float*>(data)[offset] = static_cast<float>(x);
    }
}

struct Row {
    std::int64_t number, outer, inner;

    FL_HD Row(const ZProblem& p, std::int64_t n) : number(n), outer(0), inner(n) {
        if (p.outer == 1) return;
        outer = n / p.inner;
        inner = n - outer * p.inner;
    }

    template <class T>
    FL_HD T of(const Elements& e) const {
        return read_element<T>(e, e.stride.at(outer, inner));
    }
};

// -1: the row belongs to no group (ignored, missing, a label that is no class).
FL_HD std::int64_t group_of_class(const ZProblem& p, std::int64_t target) {
    return target == p.ignore_index || target < 0 || target >= p.num_groups ? -1 : target;
}

// NaN is a missing label. Others of binary losses are numbers in [0, 1]: the nearer of 0 and 1 is the class.
FL_HD bool is_bad_label(double label) { return label < 0.0 || label > 1.0; }

// Half precision is exact in double: constant classes and ties come out as they are stored.
// T is double or a vector of them.
template <class T>
FL_HD T score_from(Statistic statistic, T x, T target) {
    switch (statistic) {
        case Statistic::kMseTarget: return target;
        case Statistic::kMseLoss: return (x - target) * (x - target);
        case Statistic::kMseResidual: return x - target;
        // An infinite logit has a finite probability but is still no number to learn from.
        case Statistic::kClassProb: return math::exp(-x);
        case Statistic::kBceProb: return math::select(is_finite(x), T(1.0) / (T(1.0) + math::exp(-x)), x);
        default: return x;
    }
}

template <class T>
struct Verdict {
    math::mask_t<T> kept;
    T z;  // standardised score; NaN without statistics
};

// T is double, or a vector of them for rows of several groups.
template <class T>
using KeepIntervalOf = BasicKeepInterval<T, math::mask_t<T>>;

template <class T>
FL_HD Verdict<T> judge(const KeepIntervalOf<T>& rule, T score) {
    using Mask = math::mask_t<T>;
    const T z = (score - rule.mean) / rule.std;
    const Mask finite = is_finite(score), near = (z >= rule.low) & (z <= rule.high);
    const Mask kept = finite & (rule.all | near);
    return {kept, math::select(finite, z, T(std::numeric_limits<double>::quiet_NaN()))};
}

// The rules of 2506.02154, with those rows dropped by selection that its code lets poison the sum. But where no row of
// a call has a finite score, none that has a label is dropped (ZProblem::keep_all): a loss of 0 would look perfect, and
// it is NaN.
FL_HD KeepInterval keep_interval_of(const ZProblem& p, std::int64_t group) {
    const double infinity = std::numeric_limits<double>::infinity();
    const double count = p.moments[group];
    // One row has no unbiased standard deviation.
    if (!(count >= p.min_count && count > 1)) return {0, std::numeric_limits<double>::quiet_NaN(), 0, 0, p.keep_small};
    KeepInterval rule{p.moments[p.num_groups + group], std::sqrt(p.moments[2 * p.num_groups + group] / (count - 1)),
                      -infinity, infinity, false};
    if (is_regression(p.statistic)) {
        rule.std += 1e-8;
    } else if (rule.std < 1e-8) {
        rule.std = 1;
        rule.all = true;
    }
    const std::int64_t which = group % p.num_thresholds;
    const double threshold =
        p.threshold.data ? read_element<double>(p.threshold, which * p.threshold.stride.inner) : p.thresholds[which];
    const bool mirrored = is_binary(p.statistic) && group % 2 == 0;
    if (p.tail == Tail::kBoth || (p.tail == Tail::kLow) != mirrored) rule.low = -threshold;
    if (p.tail == Tail::kBoth || (p.tail == Tail::kHigh) != mirrored) rule.high = threshold;
    return rule;
}

template <class A>
struct ValueAndSlope {
    A value, slope;
};

// Loss and derivative in the input of a kept row.
//   squared error: (x - y)^2
//   binary: pos_weight y softplus(-x) + (1 - y) softplus(x), softplus(s) = log(1 + exp(s)), from exp(-|x|)
template <class A>
FL_HD ValueAndSlope<A> squared_error(A x, A y) {
    return {(x - y) * (x - y), A(2) * (x - y)};
}

template <class A>
FL_HD ValueAndSlope<A> binary_loss(A x, A y, A pos_weight) {
    const math::mask_t<A> above = x > A(0);
    const A e = math::exp(math::select(above, -x, x)), rest = math::log1p(e);
    const A small = e / (A(1) + e), large = A(1) - small;  // small is at most 1/2, so that large is rounded once
    const A positive = pos_weight * y, negative = A(1) - y;
    const A value =
        positive * (math::select(above, A(0), -x) + rest) + negative * (math::select(above, x, A(0)) + rest);
    return {value, negative * math::select(above, large, small) - positive * math::select(above, small, large)};
}

template <class A>
FL_HD A class_weight_of(const ZProblem& p, const Row& row) {
    return p.class_weight.data
               ? read_element<A>(p.class_weight, row.of<std::int64_t>(p.target) * p.class_weight.stride.inner)
               : A(1);
}

FL_HD void record(const ZProblem& p, std::int64_t number, const Verdict<double>& verdict) {
    p.mask[number] = verdict.kept;
    if (p.scores) p.scores[number] = verdict.z;
}

// A target out of range stays as it is: the loss has to complain about it.
FL_HD std::int64_t kept_target_of(const ZProblem& p, std::int64_t target, std::int64_t group, bool kept) {
    return group >= 0 && !kept ? p.ignore_index : target;
}

}  // namespace z_error
}  // namespace FL_ISA
}  // namespace fused_losses
