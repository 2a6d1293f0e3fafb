// Z-Error on the CPU: what a run of rows adds. Compiled once per instruction set (FL_ISA), so no ATen header.
#include "cpu/z_error_kernels.h"

#include "cpu/scratch.h"
#include "cpu/z_error_block.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

using namespace z_error;
using D = Vec<double>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Calls body(first row, its column, rows) for every block of [begin, end). No block crosses the end of a run.
template <class Body>
void for_blocks(std::int64_t width, std::int64_t begin, std::int64_t end, Body body) {
    for (std::int64_t run = begin; run < end; run += width) {
        const std::int64_t columns = std::min(width, end - run);
        for (std::int64_t column = 0; column < columns; column += kBlockRows)
            body(run + column, column, static_cast<int>(std::min<std::int64_t>(kBlockRows, columns - column)));
    }
}

// ---- Moments -------------------------------------------------------------------------------------------------------

// ShiftedSums of the columns of one label, as arrays.
class ColumnSums {
public:
    static constexpr int kNumbers = 4;

    ColumnSums(double* memory, std::int64_t padded)
        : shift(memory), sum(shift + padded), squares(sum + padded), count(squares + padded) {}

    FL_ALWAYS_INLINE void push(std::int64_t column, D x, math::mask_t<D> mine) const {
        const D zero(0.0), n = D::load(count + column);
        const D from = math::select(mine & (n == zero), x, D::load(shift + column));
        const D d = math::select(mine, x - from, zero);
        from.store(shift + column);
        (D::load(sum + column) + d).store(sum + column);
        (D::load(squares + column) + d * d).store(squares + column);
        (n + math::select(mine, D(1.0), zero)).store(count + column);
    }

    Moments moments(std::int64_t column) const {
        return ShiftedSums{shift[column], sum[column], squares[column], static_cast<std::int64_t>(count[column])}
            .moments();
    }

private:
    double *shift, *sum, *squares, *count;
};

template <bool kBinary>
void column_moments(const ZProblem& p, std::int64_t begin, std::int64_t end, Moments* of_group) {
    constexpr int kLabels = kBinary ? 2 : 1;
    const TaskColumns columns(p);
    const std::int64_t numbers = ColumnSums::kNumbers * columns.padded;
    const Scratch<double> memory(kLabels * numbers);
    std::fill(memory.data(), memory.data() + kLabels * numbers, 0.0);
    const ColumnSums negative(memory.data(), columns.padded);
    const ColumnSums positive(memory.data() + (kLabels - 1) * numbers, columns.padded);
    ScoreBlock block;
    for_blocks(columns.width, begin, end, [&](std::int64_t first, std::int64_t column, int rows) {
        block.fill(p, first, rows);
        for_whole_vectors<double>(rows, [&](int i) {
            const D x = D::load(block.score + i);
            const auto finite = is_finite(x);
            negative.push(column + i, x, finite & block.has_label<kBinary>(i, 0));
            if (kBinary) positive.push(column + i, x, finite & block.has_label<kBinary>(i, 1));
        });
    });
    for (std::int64_t column = 0; column < columns.width; ++column) {
        const std::int64_t task = column % columns.tasks;
        of_group[kLabels * task].merge(negative.moments(column));
        if (kBinary) of_group[kLabels * task + 1].merge(positive.moments(column));
    }
}

// Calls body(group, score) for the rows that count.
template <class Body>
void for_class_scores(const ZProblem& p, std::int64_t begin, std::int64_t end, Body body) {
    ClassBlock block;
    for_blocks(kBlockRows, begin, end, [&](std::int64_t first, std::int64_t, int rows) {
        block.fill(p, first, rows);
        for (int r = 0; r < rows; ++r)
            if (block.group[r] >= 0 && is_finite(block.score[r])) body(block.group[r], block.score[r]);
    });
}

void moments(const ZProblem& p, std::int64_t begin, std::int64_t end, Moments* of_group) {
    if (is_binary(p.statistic)) return column_moments<true>(p, begin, end, of_group);
    if (is_regression(p.statistic)) return column_moments<false>(p, begin, end, of_group);
    const Scratch<ShiftedSums> sums(p.num_groups);
    std::fill(sums.data(), sums.data() + p.num_groups, ShiftedSums{});
    for_class_scores(p, begin, end, [&](std::int64_t group, double score) { sums.data()[group].push(score); });
    for (std::int64_t group = 0; group < p.num_groups; ++group) of_group[group] = sums.data()[group].moments();
}

void sparse_moments(const ZProblem& p, double* out) {
    double *const count = out, *const mean = count + p.num_groups, *const m2 = mean + p.num_groups;
    for_class_scores(p, 0, p.rows(), [&](std::int64_t group, double score) {
        Moments known{count[group], mean[group], m2[group]};
        known.merge({1, score, 0});
        count[group] = known.count;
        mean[group] = known.mean;
        m2[group] = known.m2;
    });
}

std::int64_t find_bad_label(const ZProblem& p, std::int64_t begin, std::int64_t end) {
    alignas(64) double label[kBlockRows];
    std::int64_t found = -1;
    for_blocks(kBlockRows, begin, end, [&](std::int64_t first, std::int64_t, int rows) {
        if (found >= 0) return;
        load(p, p.target, first, rows, label);
        int bad = 0;
        for (int r = 0; r < rows; ++r) bad += is_bad_label(label[r]);
        if (bad == 0) return;
        const double* const at = std::find_if(label, label + rows, [](double y) { return is_bad_label(y); });
        found = first + (at - label);
    });
    return found;
}

// ---- Mask ----------------------------------------------------------------------------------------------------------

template <bool kBinary>
void judge_block(const ZProblem& p, const double* rules, const TaskColumns& columns, std::int64_t first,
                 std::int64_t column, int rows) {
    ScoreBlock block;
    block.fill(p, first, rows);
    alignas(64) std::int8_t kept[kBlockRows];
    for_whole_vectors<double>(rows, [&](int i) {
        const auto positive = block.has_label<kBinary>(i, 1);
        const auto known = kBinary ? positive | block.has_label<kBinary>(i, 0) : positive;
        const auto number = [&](int which) {
            const double* const numbers = rules + which * columns.padded + column + i;
            if constexpr (!kBinary) return D::load(numbers);
            return math::select(positive, D::load(numbers + ZErrorIntervals::kNumbers * columns.padded),
                                D::load(numbers));
        };
        const KeepIntervalOf<D> rule{number(0), number(1), number(2), number(3), number(4) > D(0.0)};
        const auto verdict = judge<D>(rule, D::load(block.score + i));
        using Bytes __attribute__((vector_size(D::size))) = std::int8_t;
        const auto keeps = p.keep_all ? known : known & verdict.kept;
        const Bytes bytes = __builtin_convertvector(keeps.m, Bytes) & std::int8_t(1);
        std::memcpy(kept + i, &bytes, sizeof(bytes));
        math::select(known, verdict.z, D(kNan)).store(block.score + i);
    });
    std::memcpy(p.mask + first, kept, rows);
    if (p.scores) std::memcpy(p.scores + first, block.score, rows * sizeof(double));
}

void judge_classes(const ZProblem& p, const KeepInterval* rules, std::int64_t first, int rows) {
    ClassBlock block;
    block.fill(p, first, rows);
    for (int r = 0; r < rows; ++r) {
        const std::int64_t group = block.group[r];
        Verdict<double> verdict{false, kNan};
        if (group >= 0) verdict = judge<double>(rules ? rules[group] : keep_interval_of(p, group), block.score[r]);
        verdict.kept |= p.keep_all && group >= 0;
        record(p, first + r, verdict);
        if (p.kept_target) p.kept_target[first + r] = kept_target_of(p, block.target[r], group, verdict.kept);
    }
}

// Calls then(first row, rows) after every block.
template <class Then>
void judge_rows(const ZProblem& p, const ZErrorIntervals& rules, std::int64_t begin, std::int64_t end, Then then) {
    if (is_class(p.statistic))
        return for_blocks(kBlockRows, begin, end, [&](std::int64_t first, std::int64_t, int rows) {
            judge_classes(p, rules.of_group, first, rows);
            then(first, rows);
        });
    const TaskColumns columns(p);
    for_blocks(columns.width, begin, end, [&](std::int64_t first, std::int64_t column, int rows) {
        if (is_binary(p.statistic))
            judge_block<true>(p, rules.of_column, columns, first, column, rows);
        else
            judge_block<false>(p, rules.of_column, columns, first, column, rows);
        then(first, rows);
    });
}

void mask(const ZProblem& p, const ZErrorIntervals& rules, std::int64_t begin, std::int64_t end) {
    judge_rows(p, rules, begin, end, [](std::int64_t, int) {});
}

// ---- Loss and gradient ---------------------------------------------------------------------------------------------

// 1 for the rows of a block that are kept, 0 for others and for those beyond the last.
template <class A>
struct KeptBlock {
    using V = Vec<A>;
    alignas(64) A kept[kBlockRows];

    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        const bool* const mask = p.mask + begin;
        for (int r = 0; r < rows; ++r) kept[r] = static_cast<A>(mask[r]);
        for (int r = rows; r < kBlockRows; ++r) kept[r] = A(0);
    }

    // Zeros for dropped rows. By selection: x may be NaN there.
    void clear_dropped(int rows, A* x) const {
        for_whole_vectors<A>(
            rows, [&](int i) { math::select(V::load(kept + i) > V(A(0)), V::load(x + i), V(A(0))).store(x + i); });
    }
};

template <class A>
struct RowBlock {
    using V = Vec<A>;
    alignas(64) A input[kBlockRows];
    alignas(64) A target[kBlockRows];
    alignas(64) A weight[kBlockRows];
    alignas(64) A pos_weight[kBlockRows];

    RowBlock() { std::fill(pos_weight, pos_weight + kBlockRows, A(1)); }

    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        load(p, p.input, begin, rows, input);
        load(p, p.target, begin, rows, target);
        load(p, p.sample_weight, begin, rows, weight);
        if (!p.pos_weight.data) return;
        std::int64_t task = begin % p.num_pos_weights;
        for (int r = 0; r < rows; ++r) {
            pos_weight[r] = read_element<A>(p.pos_weight, task * p.pos_weight.stride.inner);
            if (++task == p.num_pos_weights) task = 0;
        }
    }

    // Loss and slope of vector i, those of dropped rows included.
    template <bool kBinary>
    FL_ALWAYS_INLINE ValueAndSlope<V> loss(int i) const {
        const V x = V::load(input + i), y = V::load(target + i);
        if constexpr (!kBinary) return squared_error(x, y);
        return binary_loss(x, y, V::load(pos_weight + i));
    }

    template <bool kBinary>
    void values(int rows, A* out) const {
        for_whole_vectors<A>(rows, [&](int i) { (V::load(weight + i) * loss<kBinary>(i).value).store(out + i); });
    }

    // Weighted losses, and the weights, of all rows.
    void values(const ZProblem& p, std::int64_t begin, int rows, A* out) {
        if (!is_class(p.statistic)) {
            fill(p, begin, rows);
            return is_binary(p.statistic) ? values<true>(rows, out) : values<false>(rows, out);
        }
        load(p, p.values, begin, rows, out);
        load(p, p.sample_weight, begin, rows, weight);
        if (!p.row_weights) weigh(rows, out);
        if (p.class_weight.data)
            for (int r = 0; r < rows; ++r)
                if (p.mask[begin + r]) weight[r] *= class_weight_of<A>(p, Row(p, begin + r));
        if (p.row_weights) weigh(rows, out);
    }

    void weigh(int rows, A* values) const {
        for (int r = 0; r < rows; ++r) values[r] *= weight[r];
    }

    template <bool kBinary>
    void gradients(int rows, A divisor, A* upstream_to_gradient) const {
        for_whole_vectors<A>(rows, [&](int i) {
            const V upstream = V::load(upstream_to_gradient + i);
            (upstream * V::load(weight + i) * loss<kBinary>(i).slope / V(divisor)).store(upstream_to_gradient + i);
        });
    }
};

// Adds numbers in several chains, always in the same order.
struct LaneSum {
    static constexpr int kLanes = 16;
    alignas(64) double lane[kLanes] = {};

    // `count` is a multiple of kLanes.
    template <class A>
    FL_ALWAYS_INLINE void add(const A* x, int count) {
        for (int r = 0; r < count; r += kLanes)
            for (int i = 0; i < kLanes; ++i) lane[i] += static_cast<double>(x[r + i]);
    }

    double total() const {
        double sum = 0;
        for (const double x : lane) sum += x;
        return sum;
    }
};

template <class A>
LossSums loss_as(const ZProblem& p, const ZErrorIntervals& rules, std::int64_t begin, std::int64_t end) {
    A* const row_values = static_cast<A*>(p.row_values);
    A* const row_weights = static_cast<A*>(p.row_weights);
    RowBlock<A> block;
    KeptBlock<A> kept;
    alignas(64) A value[kBlockRows];
    LaneSum values, weights;
    judge_rows(p, rules, begin, end, [&](std::int64_t first, int rows) {
        block.values(p, first, rows, value);
        const int padded = divide_up(rows, LaneSum::kLanes) * LaneSum::kLanes;
        kept.fill(p, first, rows);
        kept.clear_dropped(padded, value);
        kept.clear_dropped(padded, block.weight);
        if (row_values) std::memcpy(row_values + first, value, rows * sizeof(A));
        if (row_weights) std::memcpy(row_weights + first, block.weight, rows * sizeof(A));
        values.add(value, padded);
        weights.add(block.weight, padded);
    });
    return {values.total(), weights.total()};
}

template <class A>
void gradient_as(const ZProblem& p, std::int64_t begin, std::int64_t end) {
    const A divisor = p.divisor ? *static_cast<const A*>(p.divisor) : A(1);
    const A safe = divisor == A(0) ? std::numeric_limits<A>::infinity() : divisor;  // nothing left: no gradient
    RowBlock<A> block;
    KeptBlock<A> kept;
    alignas(64) A grad[kBlockRows];
    for_blocks(kBlockRows, begin, end, [&](std::int64_t first, std::int64_t, int rows) {
        block.fill(p, first, rows);
        load(p, p.upstream, first, rows, grad);
        is_binary(p.statistic) ? block.template gradients<true>(rows, safe, grad)
                               : block.template gradients<false>(rows, safe, grad);
        kept.fill(p, first, rows);
        kept.clear_dropped(rows, grad);
        store(p.grad, p.input.type, first, rows, grad);
    });
}

LossSums loss(const ZProblem& p, const ZErrorIntervals& rules, std::int64_t begin, std::int64_t end) {
    return p.acc_is_double ? loss_as<double>(p, rules, begin, end) : loss_as<float>(p, rules, begin, end);
}

void gradient(const ZProblem& p, std::int64_t begin, std::int64_t end) {
    p.acc_is_double ? gradient_as<double>(p, begin, end) : gradient_as<float>(p, begin, end);
}

}  // namespace
}  // namespace FL_ISA

template <>
ZErrorKernels z_error_kernels<Isa::FL_ISA>() {
    return {&Entry<moments>::call, &Entry<sparse_moments>::call, &Entry<mask>::call,
            &Entry<loss>::call,    &Entry<gradient>::call,       &Entry<find_bad_label>::call};
}

}  // namespace fused_losses
