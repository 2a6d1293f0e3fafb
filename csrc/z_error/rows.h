// What a row is worth to a Z-Error loss: group, score, whether it is kept, loss and slope. Shared by CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/math.h"
#include "core/numeric.h"
#include "z_error/moments.h"
#include "z_error/problem.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace z_error {

// The tensors are small beside the logits, so their types are looked up per element instead of compiling a kernel for
// every combination; the branch is the same for all rows.
template <class T>
FL_HD T read(const Elements& e, std::int64_t offset) {
    switch (e.type) {
        case ElementType::kFloat64: return static_cast<T>(static_cast<const double*>(e.data)[offset]);
        case ElementType::kFloat32: return static_cast<T>(static_cast<const float*>(e.data)[offset]);
        case ElementType::kFloat16: return static_cast<T>(widen(static_cast<const Half*>(e.data)[offset]));
        case ElementType::kBFloat16: return static_cast<T>(widen(static_cast<const BFloat16*>(e.data)[offset]));
        case ElementType::kInt64: return static_cast<T>(static_cast<const std::int64_t*>(e.data)[offset]);
        case ElementType::kInt32: return static_cast<T>(static_cast<const std::int32_t*>(e.data)[offset]);
        case ElementType::kInt16: return static_cast<T>(static_cast<const std::int16_t*>(e.data)[offset]);
        case ElementType::kInt8: return static_cast<T>(static_cast<const std::int8_t*>(e.data)[offset]);
        case ElementType::kUInt8: return static_cast<T>(static_cast<const std::uint8_t*>(e.data)[offset]);
    }
    return T(0);
}

FL_HD bool is_finite(double x) { return x - x == 0.0; }

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
        return read<T>(e, e.stride.at(outer, inner));
    }
};

// -1: the row belongs to no group (ignored, missing, a label that is no class).
FL_HD std::int64_t group_of(const ZProblem& p, const Row& row) {
    switch (p.statistic) {
        case Statistic::kClassScore: {
            const auto y = row.of<std::int64_t>(p.target);
            return y == p.ignore_index || y < 0 || y >= p.num_groups ? -1 : y;
        }
        case Statistic::kBceLogit:
        case Statistic::kBceProb: {
            const auto label = row.of<double>(p.target);
            const std::int64_t first = row.number % (p.num_groups / 2) * 2;
            return label == 1.0 ? first + 1 : label == 0.0 ? first : -1;
        }
        default: return 0;
    }
}

// Half precision is exact in double: constant classes and ties come out as they are stored.
FL_HD double score_of(const ZProblem& p, const Row& row, std::int64_t group) {
    const auto input_at = [&](std::int64_t offset) { return read<double>(p.input, offset); };
    const std::int64_t offset = p.input.stride.at(row.outer, row.inner);
    switch (p.statistic) {
        case Statistic::kClassScore: return input_at(p.gathers ? offset + group * p.class_stride : offset);
        case Statistic::kBceLogit: return input_at(offset);
        case Statistic::kBceProb: {
            const double x = input_at(offset);
            // An infinite logit has a finite probability but is still no number to learn from.
            return is_finite(x) ? 1.0 / (1.0 + math::exp(-x)) : x;
        }
        case Statistic::kMseTarget: return row.of<double>(p.target);
        default: break;
    }
    const double residual = input_at(offset) - row.of<double>(p.target);
    return p.statistic == Statistic::kMseResidual ? residual : residual * residual;
}

struct Verdict {
    bool kept;
    double z;  // standardised score; NaN without statistics
};

// The rules of 2506.02154, with those rows dropped by selection that its code lets poison the sum.
FL_HD Verdict judge(const ZProblem& p, std::int64_t group, double score) {
    const double none = std::numeric_limits<double>::quiet_NaN();
    if (group < 0 || !is_finite(score)) return {false, none};
    const double count = p.moments[group];
    // One row has no unbiased standard deviation.
    if (!(count >= p.min_count && count > 1)) return {p.keep_small, none};
    const double deviation = score - p.moments[p.num_groups + group];
    double std = std::sqrt(p.moments[2 * p.num_groups + group] / (count - 1));
    const bool regression = p.statistic >= Statistic::kMseTarget;
    const bool constant = !regression && std < 1e-8;
    if (regression) std += 1e-8;
    const double z = deviation / (constant ? 1.0 : std);
    if (constant) return {true, z};
    const std::int64_t which = group % p.num_thresholds;
    const double threshold =
        p.threshold.data ? read<double>(p.threshold, which * p.threshold.stride.inner) : p.thresholds[which];
    const bool mirrored = (p.statistic == Statistic::kBceLogit || p.statistic == Statistic::kBceProb) && group % 2 == 0;
    const double oriented = mirrored ? -z : z;
    switch (p.tail) {
        case Tail::kLow: return {oriented >= -threshold, z};
        case Tail::kHigh: return {oriented <= threshold, z};
        default: return {std::abs(z) <= threshold, z};
    }
}

template <class A>
struct ValueAndSlope {
    A value, slope;
};

// Loss of a kept row and its derivative in the input.
//   squared error: (f - t)^2
//   binary, label 1: pos_weight softplus(-x); label 0: softplus(x)
template <class A>
FL_HD ValueAndSlope<A> loss_of(const ZProblem& p, const Row& row, bool with_slope) {
    const A x = row.of<A>(p.input), y = row.of<A>(p.target);
    if (p.statistic >= Statistic::kMseTarget) return {(x - y) * (x - y), A(2) * (x - y)};
    const bool positive = y == A(1);
    A factor = A(1);
    if (positive && p.pos_weight.data)
        factor = read<A>(p.pos_weight, row.number % p.num_pos_weights * p.pos_weight.stride.inner);
    const A s = positive ? -x : x;
    const A e = math::exp(s > A(0) ? -s : s);  // exp(-|s|)
    const A slope = with_slope ? factor * (s > A(0) ? A(1) : e) / (A(1) + e) : A(0);
    return {factor * ((s > A(0) ? s : A(0)) + math::log1p(e)), positive ? -slope : slope};
}

// Weighted loss of a kept row, its weight: what the mean is made of. Zero for a dropped row, whatever it holds.
template <class A>
struct Share {
    A value, weight;
};

template <class A>
FL_HD Share<A> share_of(const ZProblem& p, const Row& row, bool kept) {
    if (!kept) return {A(0), A(0)};
    const A weight = p.sample_weight.data ? row.of<A>(p.sample_weight) : A(1);
    return {weight * loss_of<A>(p, row, false).value, weight};
}

// Judges a row, writes what is asked for, and returns whether it is kept.
FL_HD bool mask_row(const ZProblem& p, const Row& row) {
    const std::int64_t group = group_of(p, row);
    const double score = group < 0 ? 0.0 : score_of(p, row, group);
    const Verdict verdict = judge(p, group, score);
    p.mask[row.number] = verdict.kept;
    if (p.scores) p.scores[row.number] = verdict.z;
    if (p.kept_target) {
        // A target out of range stays as it is: the loss has to complain about it.
        const auto y = row.of<std::int64_t>(p.target);
        p.kept_target[row.number] = group >= 0 && !verdict.kept ? p.ignore_index : y;
    }
    return verdict.kept;
}

// Derivative of the reduced loss in a row's input.
template <class A>
FL_HD A gradient_of(const ZProblem& p, const Row& row) {
    if (!p.mask[row.number]) return A(0);
    const A divisor = p.divisor ? *static_cast<const A*>(p.divisor) : A(1);
    if (divisor == A(0)) return A(0);
    const A weight = p.sample_weight.data ? row.of<A>(p.sample_weight) : A(1);
    return row.of<A>(p.upstream) * weight / divisor * loss_of<A>(p, row, true).slope;
}

}  // namespace z_error
}  // namespace FL_ISA
}  // namespace fused_losses
