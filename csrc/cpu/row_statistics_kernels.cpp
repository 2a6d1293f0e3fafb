// Compiled once per instruction set (FL_ISA), as kernels.cpp. Rows of many contiguous classes are taken a vector of
// classes at a time; others, a vector of rows at a time, are brought into blocks [classes][vector of rows] first.
#include "cpu/row_statistics_kernels.h"

#include "core/row_statistics.h"
#include "cpu/vertical_tile.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

template <class Stored>
class StatisticsRows {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    using OfClasses = RowSummary<V, V>;
    using OfRow = RowSummary<A, A>;
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();
    static constexpr A kNan = std::numeric_limits<A>::quiet_NaN();
    static constexpr std::int64_t kExactIntegers = std::int64_t(1) << math::FloatFormat<A>::mantissa_bits;

public:
    explicit StatisticsRows(const RowProblem& problem)
        : p(problem),
          classes(problem.num_classes),
          in_rows(p.logits_class_stride == 1 && classes > Tiling::kVerticalClasses),
          block(in_rows ? 0 : classes * V::size) {}

    // Rows [first, first + n) of image `outer`.
    void run(std::int64_t outer, std::int64_t first, int n) {
        const int step = in_rows ? 1 : V::size;
        for (int i = 0; i < n; i += step) {
            const std::int64_t row = first + i;
            in_rows ? take_row(outer, row) : take_block(outer, row, std::min(step, n - i));
        }
    }

private:
    struct Label {
        std::int64_t cls;  // 0 where it is ignored
        bool ignored;
    };

    Label label(std::int64_t outer, std::int64_t row) const {
        const std::int64_t at = p.target_stride.at(outer, row);
        std::int64_t cls = 0;
        switch (p.index_type) {
            case IndexType::kInt64: cls = as<std::int64_t>(p.target)[at]; break;
            case IndexType::kInt32: cls = as<std::int32_t>(p.target)[at]; break;
            case IndexType::kInt16: cls = as<std::int16_t>(p.target)[at]; break;
            case IndexType::kUInt8: cls = as<std::uint8_t>(p.target)[at]; break;
        }
        return cls == p.ignore_index ? Label{0, true} : Label{cls, false};
    }

    void take_row(std::int64_t outer, std::int64_t row) {
        const Stored* const x = logits_at<Stored>(p, outer, row);
        OfClasses partial = OfClasses::none();
        V number = V::iota();
        for_vectors<A>(classes, [&](std::int64_t c, auto count) {
            partial.compare(load_n_or(x + c, count, kLowest), number);
            number += V(A(V::size));
        });
        OfRow all = OfRow::none();
        for (int i = 0; i < V::size; ++i)
            all.merge({partial.top.v[i], partial.second.v[i], partial.index.v[i], A(0), A(0)});
        OfClasses sums = OfClasses::none();
        sums.top = all.top;
        for_vectors<A>(classes, [&](std::int64_t c, auto count) { sums.add(load_n_or(x + c, count, kLowest)); });
        all.sum = sums.sum.sum(), all.weighted = sums.weighted.sum();
        const Label labelled = label(outer, row);
        write(outer, row, labelled, all.finish(widen(x[labelled.cls]), A(labelled.cls)), all.sum, all.index);
    }

    void take_block(std::int64_t outer, std::int64_t row, int n) {
        A* const z = block.data();
        VerticalBlock<Stored>::load_classes(logits_at<Stored>(p, outer, row), p.logits_stride.inner,
                                            p.logits_class_stride, classes, n, z);
        OfClasses all = OfClasses::none();
        for (std::int64_t c = 0; c < classes; ++c) all.compare(V::load(z + c * V::size), V(A(c)));
        for (std::int64_t c = 0; c < classes; ++c) all.add(V::load(z + c * V::size));
        Label labels[V::size] = {};
        V target_logit = A(0), target = A(0);
        for (int i = 0; i < n; ++i) {
            labels[i] = label(outer, row + i);
            target_logit.v[i] = z[labels[i].cls * V::size + i];
            target.v[i] = A(labels[i].cls);
        }
        const RowStatisticsOf<V> found = all.finish(target_logit, target);
        for (int i = 0; i < n; ++i) {
            RowStatisticsOf<A> of_row;
            for (int k = 0; k < kRowStatistics; ++k) of_row.v[k] = found.v[k].v[i];
            write(outer, row + i, labels[i], of_row, all.sum.v[i], all.index.v[i]);
        }
    }

    void write(std::int64_t outer, std::int64_t row, const Label& labelled, RowStatisticsOf<A> found, A sum,
               A index) const {
        const std::int64_t number = outer * p.inner + row;
        std::int64_t argmax = static_cast<std::int64_t>(index);
        if (!(sum > A(0)) || classes > kExactIntegers) {
            const Stored* const x = logits_at<Stored>(p, outer, row);
            const std::int64_t nan = find(x, [](A z) { return z != z; });
            const bool has_nan = nan < classes;
            argmax = has_nan ? nan : find(x, [&](A z) { return z == found.v[kMaxLogit]; });
            if (!(sum > A(0))) leave_undefined(found, has_nan);
        }
        p.argmax[number] = argmax;
        for (int k = 0; k < kRowStatistics; ++k)
            static_cast<A*>(p.stats)[k * p.rows() + number] = labelled.ignored ? kNan : found.v[k];
    }

    // The first class that is as asked for; the number of classes if none is.
    template <class Is>
    std::int64_t find(const Stored* x, Is is) const {
        std::int64_t c = 0;
        while (c < classes && !is(widen(x[c * p.logits_class_stride]))) ++c;
        return c;
    }

    const RowProblem& p;
    const std::int64_t classes;
    const bool in_rows;
    Scratch<A> block;
};

template <class Stored>
void run_as(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    const StatisticsRuns runs(p);
    StatisticsRows<Stored> rows(p);
    for (std::int64_t run = begin; run < end; ++run) {
        const std::int64_t first = run % runs.per_outer * runs.kRows;
        rows.run(run / runs.per_outer, first, static_cast<int>(std::min(runs.kRows + 0, p.inner - first)));
    }
}

void run(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    switch (p.dtype) {
        case Dtype::kFloat64: return run_as<double>(p, begin, end);
        case Dtype::kFloat32: return run_as<float>(p, begin, end);
        case Dtype::kFloat16: return run_as<Half>(p, begin, end);
        case Dtype::kBFloat16: return run_as<BFloat16>(p, begin, end);
    }
}

}  // namespace
}  // namespace FL_ISA

template <>
RowStatisticsKernel row_statistics_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
