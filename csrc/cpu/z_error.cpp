// Z-Error operators on the CPU. Rows are split into chunks that depend on the problem alone, and what chunks found is
// combined in their order: the same bits for any number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "z_error/driver.h"
#include "z_error/rows.h"

namespace fused_losses {
namespace {

using z_error::GroupRule;
using z_error::Row;

constexpr std::int64_t kChunkRows = 4096;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Calls body(chunk, first row, end) for every chunk.
template <class Body>
void for_each_chunk(std::int64_t rows, std::int64_t chunk_rows, const Body& body) {
    at::parallel_for(0, divide_up(rows, chunk_rows), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk)
            body(chunk, chunk * chunk_rows, std::min(rows, (chunk + 1) * chunk_rows));
    });
}

// Rows whose numbers are gathered into arrays, so that the arithmetic on them is vectorised.
constexpr int kBlockRows = 256;

template <class T, class A>
void load_run(const Elements& e, std::int64_t begin, int rows, A* out) {
    const T* const data = static_cast<const T*>(e.data) + begin * e.stride.inner;
    for (int r = 0; r < rows; ++r) out[r] = static_cast<A>(widen(data[r * e.stride.inner]));
}

// Ones for an absent tensor.
template <class A>
void load(const ZProblem& p, const Elements& e, std::int64_t begin, int rows, A* out) {
    if (!e.data) {
        std::fill(out, out + rows, A(1));
    } else if (p.outer == 1 && e.type == ElementType::kFloat32) {
        load_run<float>(e, begin, rows, out);
    } else if (p.outer == 1 && e.type == ElementType::kFloat64) {
        load_run<double>(e, begin, rows, out);
    } else if (p.outer == 1 && e.type == ElementType::kBFloat16) {
        load_run<BFloat16>(e, begin, rows, out);
    } else {
        for (int r = 0; r < rows; ++r) out[r] = Row(p, begin + r).of<A>(e);
    }
}

// Group and score of rows.
struct ScoreBlock {
    std::int64_t group[kBlockRows];
    double score[kBlockRows];

    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        if (is_class(p.statistic)) {
            for (int r = 0; r < rows; ++r) {
                const Row row(p, begin + r);
                group[r] = z_error::group_of(p, row);
                score[r] = group[r] < 0 ? 0.0 : z_error::score_of(p, row, group[r]);
            }
            return;
        }
        double target[kBlockRows];
        load(p, p.input, begin, rows, score);
        load(p, p.target, begin, rows, target);
        for (int r = 0; r < rows; ++r) {
            group[r] = is_regression(p.statistic) ? 0 : z_error::group_of_label(p, begin + r, target[r]);
            score[r] = z_error::score_from(p.statistic, score[r], target[r]);
        }
    }
};

void moments(const ZProblem& p, double* out) {
    // Every chunk has sums for every group: few chunks where there are many groups.
    constexpr std::int64_t max_chunks = 64;
    const std::int64_t rows = p.rows(), groups = p.num_groups;
    const std::int64_t chunk_rows = std::max({kChunkRows, 2 * groups, divide_up(rows, max_chunks)});
    const std::int64_t chunks = divide_up(rows, chunk_rows);
    std::vector<ShiftedSums> sums(chunks * groups);
    for_each_chunk(rows, chunk_rows, [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        ShiftedSums* const of_group = sums.data() + chunk * groups;
        ScoreBlock block;
        for (std::int64_t first = begin; first < end; first += kBlockRows) {
            const int count = static_cast<int>(std::min<std::int64_t>(kBlockRows, end - first));
            block.fill(p, first, count);
            for (int r = 0; r < count; ++r)
                if (block.group[r] >= 0 && z_error::is_finite(block.score[r]))
                    of_group[block.group[r]].push(block.score[r]);
        }
    });
    at::parallel_for(0, groups, 1024, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t group = begin; group < end; ++group) {
            Moments total;
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total.merge(sums[chunk * groups + group].moments());
            out[group] = total.count;
            out[groups + group] = total.mean;
            out[2 * groups + group] = total.m2;
        }
    });
}

// The rule of every group, where there are fewer groups than rows.
std::vector<GroupRule> rules_of(const ZProblem& p) {
    std::vector<GroupRule> rules;
    if (p.num_groups > p.rows()) return rules;
    rules.reserve(p.num_groups);
    for (std::int64_t group = 0; group < p.num_groups; ++group) rules.push_back(z_error::rule_of(p, group));
    return rules;
}

// At most kBlockRows rows.
void mask_block(const ZProblem& p, const std::vector<GroupRule>& rules, std::int64_t begin, int rows) {
    ScoreBlock block;
    block.fill(p, begin, rows);
    for (int r = 0; r < rows; ++r) {
        const std::int64_t group = block.group[r];
        z_error::Verdict verdict{false, std::numeric_limits<double>::quiet_NaN()};
        if (group >= 0) verdict = (rules.empty() ? z_error::rule_of(p, group) : rules[group]).judge(block.score[r]);
        z_error::record(p, Row(p, begin + r), group, verdict);
    }
}

void mask(const ZProblem& p) {
    const std::vector<GroupRule> rules = rules_of(p);
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        for (std::int64_t first = begin; first < end; first += kBlockRows)
            mask_block(p, rules, first, static_cast<int>(std::min<std::int64_t>(kBlockRows, end - first)));
    });
}

template <class A>
void binary_losses(int rows, const A* __restrict input, const A* __restrict target, const A* __restrict pos_weight,
                   A* __restrict value, A* __restrict slope) {
#pragma omp simd
    for (int r = 0; r < rows; ++r) {
        const auto computed = z_error::binary_loss(input[r], target[r], pos_weight[r]);
        value[r] = computed.value;
        slope[r] = computed.slope;
    }
}

template <class A>
struct RowBlock {
    A input[kBlockRows], target[kBlockRows], weight[kBlockRows], pos_weight[kBlockRows];
    A value[kBlockRows], slope[kBlockRows];

    // Weighted losses of class rows, and their weights, the latter of kept rows.
    void fill_classes(const ZProblem& p, std::int64_t begin, int rows) {
        load(p, p.values, begin, rows, value);
        load(p, p.sample_weight, begin, rows, weight);
        for (int r = 0; r < rows; ++r) value[r] *= weight[r];
        if (!p.class_weight.data) return;
        for (int r = 0; r < rows; ++r)
            if (p.mask[begin + r]) weight[r] *= z_error::class_weight_of<A>(p, Row(p, begin + r));
    }

    // Weighted loss and slope of all rows, dropped ones included.
    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        load(p, p.input, begin, rows, input);
        load(p, p.target, begin, rows, target);
        load(p, p.sample_weight, begin, rows, weight);
        if (is_regression(p.statistic)) {
            for (int r = 0; r < rows; ++r) {
                const auto computed = z_error::squared_error(input[r], target[r]);
                value[r] = computed.value;
                slope[r] = computed.slope;
            }
        } else {
            for (int r = 0; r < rows; ++r) pos_weight[r] = z_error::pos_weight_of<A>(p, begin + r);
            binary_losses(rows, input, target, pos_weight, value, slope);
        }
        for (int r = 0; r < rows; ++r) value[r] *= weight[r];
    }
};

template <class A>
void loss_as(const ZProblem& p) {
    struct Sums {
        double value = 0, weight = 0;
    };
    const std::vector<GroupRule> rules = rules_of(p);
    std::vector<Sums> sums(divide_up(p.rows(), kChunkRows));
    A* const row_values = static_cast<A*>(p.row_values);
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        Sums local;
        RowBlock<A> block;
        for (std::int64_t first = begin; first < end; first += kBlockRows) {
            const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, end - first));
            mask_block(p, rules, first, rows);
            is_class(p.statistic) ? block.fill_classes(p, first, rows) : block.fill(p, first, rows);
            for (int r = 0; r < rows; ++r) {
                const bool kept = p.mask[first + r];
                const A value = kept ? block.value[r] : A(0);
                if (row_values) row_values[first + r] = value;
                local.value += static_cast<double>(value);
                local.weight += kept ? static_cast<double>(block.weight[r]) : 0.0;
            }
        }
        sums[chunk] = local;
    });
    Sums total;
    for (const Sums& s : sums) {
        total.value += s.value;
        total.weight += s.weight;
    }
    *static_cast<A*>(p.denominator) = static_cast<A>(total.weight);
    if (p.reduction == Reduction::kMean) total.value = total.weight == 0 ? 0.0 : total.value / total.weight;
    if (p.reduction != Reduction::kNone) *static_cast<A*>(p.loss) = static_cast<A>(total.value);
}

template <class A>
void gradient_as(const ZProblem& p) {
    const A divisor = p.divisor ? *static_cast<const A*>(p.divisor) : A(1);
    const A share = divisor == A(0) ? A(0) : A(1) / divisor;
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        RowBlock<A> block;
        A upstream[kBlockRows];
        for (std::int64_t first = begin; first < end; first += kBlockRows) {
            const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, end - first));
            block.fill(p, first, rows);
            load(p, p.upstream, first, rows, upstream);
            for (int r = 0; r < rows; ++r) {
                const A grad = upstream[r] * share * block.weight[r] * block.slope[r];
                z_error::write(p.grad, p.input.type, first + r, p.mask[first + r] ? grad : A(0));
            }
        }
    });
}

void loss(const ZProblem& p) {
    if (p.own_moments) moments(p, p.own_moments);
    p.acc_is_double ? loss_as<double>(p) : loss_as<float>(p);
}

void gradient(const ZProblem& p) { p.acc_is_double ? gradient_as<double>(p) : gradient_as<float>(p); }

}  // namespace

ZErrorDriver cpu_z_error() { return {&moments, &mask, &loss, &gradient}; }

}  // namespace fused_losses
