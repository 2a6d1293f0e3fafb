// A look at the targets before anything is computed: are they all classes, and what do their rows weigh together?
#pragma once

#include "core/row_problem.h"
#include "cpu/kernels.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Index, class A>
class TargetSummaries {
public:
    // Of the rows' labels, or of their second ones.
    TargetSummaries(const RowProblem& problem, bool other)
        : p(problem),
          labels(as<Index>(other ? p.other_target : p.target)),
          label_stride(other ? p.other_target_stride : p.target_stride),
          is_other(other) {}

    // Rows [begin, end) in the order of their numbers.
    TargetSummary rows(std::int64_t begin, std::int64_t end) const {
        TargetSummary total;
        while (begin < end && !total.is_bad()) {
            const std::int64_t outer = begin / p.inner, i = begin % p.inner;
            const std::int64_t n = std::min(end - begin, p.inner - i);
            const TargetSummary part = rows_of(outer, i, n);
            total = {total.weight + part.weight, part.bad_row, part.bad_target};
            begin += n;
        }
        return total;
    }

private:
    // Rows [first, first + n) of image `outer`.
    TargetSummary rows_of(std::int64_t outer, std::int64_t first, std::int64_t n) const {
        TargetSummary summary{double(n)};
        if (labels) {
            const Index* const targets = labels + label_stride.at(outer, first);
            const std::int64_t stride = label_stride.inner;
            const Found found =
                stride == 1 ? look(targets, std::integral_constant<int, 1>{}, n) : look(targets, stride, n);
            summary.weight = double(found.counted);
            if (found.bad > 0) name_first_bad(summary, targets, outer * p.inner + first, n);
        }
        if (!summary.is_bad() && ((labels && p.class_weight) || p.sample_weight || p.lam))
            summary.weight = weigh(outer, first, n);
        return summary;
    }

    // What is to be known of a target; a copy of it stays in registers.
    struct TargetCheck {
        std::int64_t ignore_index;
        std::uint64_t num_classes;

        std::int64_t counts(std::int64_t y) const { return y != ignore_index; }
        std::int64_t is_bad(std::int64_t y) const { return counts(y) & (static_cast<std::uint64_t>(y) >= num_classes); }
    };
    TargetCheck target_check() const { return {p.ignore_index, static_cast<std::uint64_t>(p.num_classes)}; }

    struct Found {
        std::int64_t counted = 0, bad = 0;
    };

    // Without branches, and of contiguous targets in vectors.
    template <class Stride>
    Found look(const Index* targets, Stride stride, std::int64_t n) const {
        const TargetCheck is = target_check();
        Found found;
        for (std::int64_t i = 0; i < n; ++i) {
            found.counted += is.counts(targets[i * stride]);
            found.bad += is.is_bad(targets[i * stride]);
        }
        return found;
    }

    void name_first_bad(TargetSummary& summary, const Index* targets, std::int64_t row, std::int64_t n) const {
        for (std::int64_t i = 0; i < n && !summary.is_bad(); ++i) {
            const std::int64_t y = targets[i * label_stride.inner];
            if (target_check().is_bad(y)) summary.bad_row = row + i, summary.bad_target = y;
        }
    }

    double weigh(std::int64_t outer, std::int64_t first, std::int64_t n) const {
        const A* const weights = labels ? as<A>(p.class_weight) : nullptr;
        const A *const samples = as<A>(p.sample_weight), *const lams = as<A>(p.lam);
        double sum = 0;
        for (std::int64_t i = first; i < first + n; ++i) {
            const std::int64_t y = labels ? labels[label_stride.at(outer, i)] : std::int64_t(0);
            if (labels && !target_check().counts(y)) continue;
            double weight = weights ? double(weights[y]) : 1.0;
            if (lams) weight *= part_of_label(double(lams[p.lam_stride.at(outer, i)]));
            sum += samples ? weight * double(samples[p.sample_weight_stride.at(outer, i)]) : weight;
        }
        return sum;
    }

    double part_of_label(double lam) const { return is_other ? 1.0 - lam : lam; }

    const RowProblem& p;
    const Index* const labels;
    const RowStride label_stride;
    const bool is_other;
};

inline TargetSummary summarize_targets(const RowProblem& p, bool other, std::int64_t begin, std::int64_t end) {
    return visit_index_type(p.index_type, [&]<class Index>() {
        return p.dtype == Dtype::kFloat64 ? TargetSummaries<Index, double>(p, other).rows(begin, end)
                                          : TargetSummaries<Index, float>(p, other).rows(begin, end);
    });
}

}  // namespace FL_ISA
}  // namespace fused_losses
