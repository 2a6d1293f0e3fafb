// One row of a Z-Error loss, by one thread.
#pragma once

#include "cuda/row_access.cuh"
#include "z_error/rows.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace z_error {

// -1: as group_of_class.
FL_DEVICE std::int64_t group_of_label(const ZProblem& p, std::int64_t number, double label) {
    const std::int64_t first = p.num_groups == 2 ? 0 : number % (p.num_groups / 2) * 2;
    assert(!is_bad_label(label) && "fused_losses: label outside [0, 1]");
    return label == label ? first + (label > 0.5) : -1;
}

FL_DEVICE std::int64_t group_of(const ZProblem& p, const Row& row) {
    if (is_class(p.statistic)) return group_of_class(p, row.of<std::int64_t>(p.target));
    const double label = row.of<double>(p.target);
    if (!is_regression(p.statistic)) return group_of_label(p, row.number, label);
    if (label != label) return -1;
    return p.num_groups == 1 ? 0 : row.number % p.num_groups;
}

FL_DEVICE double score_of(const ZProblem& p, const Row& row, std::int64_t group) {
    const std::int64_t offset = p.input.stride.at(row.outer, row.inner);
    const double x = read_element<double>(p.input, p.gathers ? offset + group * p.class_stride : offset);
    return is_regression(p.statistic) ? score_from(p.statistic, x, row.of<double>(p.target))
                                      : score_from(p.statistic, x, 0.0);
}

template <class A>
FL_DEVICE A pos_weight_of(const ZProblem& p, std::int64_t number) {
    if (!p.pos_weight.data) return A(1);
    return read_element<A>(p.pos_weight,
                           p.num_pos_weights == 1 ? 0 : number % p.num_pos_weights * p.pos_weight.stride.inner);
}

template <class A>
FL_DEVICE ValueAndSlope<A> loss_of(const ZProblem& p, const Row& row) {
    const A x = row.of<A>(p.input), y = row.of<A>(p.target);
    return is_regression(p.statistic) ? squared_error(x, y) : binary_loss(x, y, pos_weight_of<A>(p, row.number));
}

// Weighted loss of a kept row, its weight: what the mean is made of. Zero for a dropped row, whatever it holds.
template <class A>
struct WeightedLoss {
    A value, weight;
};

template <class A>
FL_DEVICE WeightedLoss<A> weighted_loss_of(const ZProblem& p, const Row& row, bool kept) {
    if (!kept) return {A(0), A(0)};
    const A weight = p.sample_weight.data ? row.of<A>(p.sample_weight) : A(1);
    if (is_class(p.statistic)) {
        const A weight_of_class = weight * class_weight_of<A>(p, row);
        return {(p.row_weights ? weight_of_class : weight) * row.of<A>(p.values), weight_of_class};
    }
    return {weight * loss_of<A>(p, row).value, weight};
}

// Judges a row and returns whether it is kept. keep_all: as in ZProblem.
FL_DEVICE bool mask_row(const ZProblem& p, const Row& row, bool keep_all) {
    const std::int64_t group = group_of(p, row);
    Verdict<double> verdict{false, std::numeric_limits<double>::quiet_NaN()};
    if (group >= 0) verdict = judge<double>(keep_interval_of(p, group), score_of(p, row, group));
    verdict.kept |= keep_all && group >= 0;
    record(p, row.number, verdict);
    if (p.kept_target)
        p.kept_target[row.number] = kept_target_of(p, row.of<std::int64_t>(p.target), group, verdict.kept);
    return verdict.kept;
}

// Derivative of the reduced loss in a row's input.
template <class A>
FL_DEVICE A gradient_of(const ZProblem& p, const Row& row) {
    if (!p.mask[row.number]) return A(0);
    const A divisor = p.divisor ? *static_cast<const A*>(p.divisor) : A(1);
    if (divisor == A(0)) return A(0);
    const A weight = p.sample_weight.data ? row.of<A>(p.sample_weight) : A(1);
    return row.of<A>(p.upstream) * weight * loss_of<A>(p, row).slope / divisor;
}

}  // namespace z_error
}  // namespace FL_ISA
}  // namespace fused_losses
