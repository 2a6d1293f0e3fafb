// Row statistics (core/row_statistics.h) of the CPU, for rows in memory or for those that a loss has just read. Rows of
// many contiguous classes are taken a vector of classes at a time; others, a vector of rows at a time, are brought into
// blocks [classes][vector of rows] first.
#pragma once

#include "core/row_statistics.h"
#include "cpu/vertical_tile.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class StatisticsRows {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    using OfRow = RowSummary<A, A>;
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();
    static constexpr A kNan = std::numeric_limits<A>::quiet_NaN();
    static constexpr std::int64_t kExactIntegers = std::int64_t(1) << math::FloatFormat<A>::mantissa_bits;

public:
    using OfBlock = RowSummary<V, V>;

    explicit StatisticsRows(const RowProblem& problem)
        : p(problem),
          classes(problem.num_classes),
          in_rows(p.logits_class_stride == 1 && classes > Tiling::kVerticalClasses),
          block(in_rows || !p.argmax ? 0 : classes * V::size) {}

    // Rows [first, first + n) of image `outer`.
    void run(std::int64_t outer, std::int64_t first, int n) {
        const int step = in_rows ? 1 : V::size;
        for (int i = 0; i < n; i += step) {
            const std::int64_t row = first + i;
            in_rows ? take_row(outer, row) : take_block(outer, row, std::min(step, n - i));
        }
    }

    // A row of contiguous classes whose sums of exp(z - max) and exp(z - max) (z - max) are known.
    void take_row(std::int64_t outer, std::int64_t row, A sum, A weighted) const {
        OfRow all = compared(logits_at<Stored>(p, outer, row));
        all.sum = sum, all.weighted = weighted;
        write_row(outer, row, all);
    }

    // Of a block, without sums.
    OfBlock compared_block(const A* z) const {
        OfBlock all = OfBlock::none();
        for (std::int64_t c = 0; c < classes; ++c) all.compare(V::load(z + c * V::size), V(A(c)));
        return all;
    }

    // n rows, no more than a vector, in a block of which all is known.
    void write_block(std::int64_t outer, std::int64_t row, int n, const OfBlock& all, V target_logit) const {
        Label labels[V::size];
        V target = A(0);
        for (int i = 0; i < n; ++i) {
            labels[i] = label(outer, row + i);
            target.v[i] = A(labels[i].cls);
        }
        const RowStatisticsOf<V> found = finish(all, target_logit, target);
        if (is_ordinary(all, n)) return write_all(outer * p.inner + row, n, labels, found, all.index);
        for (int i = 0; i < n; ++i) {
            RowStatisticsOf<A> of_row;
            for (int k = 0; k < kRowStatistics; ++k) of_row.v[k] = found.v[k].v[i];
            write(outer, row + i, labels[i], of_row, all.sum.v[i], all.index.v[i]);
        }
    }

private:
    struct Label {
        std::int64_t cls;  // 0 where it is ignored
        bool ignored;
    };

    Label label(std::int64_t outer, std::int64_t row) const {
        const std::int64_t cls = class_index(p, p.target_stride.at(outer, row));
        return cls == p.ignore_index ? Label{0, true} : Label{cls, false};
    }

    // Whether all rows have probabilities, and class numbers without gaps.
    bool is_ordinary(const OfBlock& all, int n) const {
        bool ordinary = classes <= kExactIntegers;
        for (int i = 0; i < n; ++i) ordinary &= all.sum.v[i] > A(0);
        return ordinary;
    }

    void write_all(std::int64_t number, int n, const Label* labels, const RowStatisticsOf<V>& found, V index) const {
        V hidden = A(0);
        for (int i = 0; i < n; ++i) {
            hidden.v[i] = labels[i].ignored ? kNan : A(0);
            p.argmax[number + i] = static_cast<std::int64_t>(index.v[i]);
        }
        A* const to = static_cast<A*>(p.row_statistics) + number;
        for (int k = 0; k < kRowStatistics; ++k)
            store_n(to + k * p.rows(), math::select(hidden == hidden, found.v[k], hidden), n);
    }

    // Class numbers beyond kExactIntegers are rounded: a target counts as the largest only if its logit is as large.
    template <class T>
    static RowStatisticsOf<T> finish(const RowSummary<T, T>& all, T target_logit, T target) {
        return all.finish(target_logit, math::select(target_logit < all.top, T(A(-1)), target));
    }

    OfRow compared(const Stored* x) const {
        OfBlock partial = OfBlock::none();
        V number = V::iota();
        for_vectors<A>(classes, [&](std::int64_t c, auto count) {
            partial.compare(load_n_or(x + c, count, kLowest), number);
            number += V(A(V::size));
        });
        const A top = partial.top.max();
        int winner = -1;
        for (int i = 0; i < V::size; ++i)
            if (partial.top.v[i] == top && (winner < 0 || partial.index.v[i] < partial.index.v[winner])) winner = i;
        OfRow all = OfRow::none();
        all.top = top, all.index = partial.index.v[winner];
        for (int i = 0; i < V::size; ++i)
            all.second = std::max(all.second, i == winner ? partial.second.v[i] : partial.top.v[i]);
        return all;
    }

    void take_row(std::int64_t outer, std::int64_t row) const {
        const Stored* const x = logits_at<Stored>(p, outer, row);
        OfRow all = compared(x);
        OfBlock sums = OfBlock::none();
        sums.top = all.top;
        for_vectors<A>(classes, [&](std::int64_t c, auto count) { sums.add(load_n_or(x + c, count, kLowest)); });
        all.sum = sums.sum.sum(), all.weighted = sums.weighted.sum();
        write_row(outer, row, all);
    }

    void write_row(std::int64_t outer, std::int64_t row, const OfRow& all) const {
        const Label labelled = label(outer, row);
        const A target_logit = widen(logits_at<Stored>(p, outer, row)[labelled.cls]);
        write(outer, row, labelled, finish(all, target_logit, A(labelled.cls)), all.sum, all.index);
    }

    void take_block(std::int64_t outer, std::int64_t row, int n) {
        A* const z = block.data();
        VerticalBlock<Stored>::load_classes(logits_at<Stored>(p, outer, row), p.logits_stride.inner,
                                            p.logits_class_stride, classes, n, z);
        OfBlock all = compared_block(z);
        for (std::int64_t c = 0; c < classes; ++c) all.add(V::load(z + c * V::size));
        V target_logit = A(0);
        for (int i = 0; i < n; ++i) target_logit.v[i] = z[label(outer, row + i).cls * V::size + i];
        write_block(outer, row, n, all, target_logit);
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
            static_cast<A*>(p.row_statistics)[k * p.rows() + number] = labelled.ignored ? kNan : found.v[k];
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

}  // namespace FL_ISA
}  // namespace fused_losses
