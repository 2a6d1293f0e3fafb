// Z-Error operators on the CPU. Rows are split into chunks that depend on the problem alone, and what chunks found is
// combined in their order: the same bits for any number of threads.
#include <algorithm>
#include <vector>

#include "cpu/choose_isa.h"
#include "cpu/work_stealing.h"
#include "cpu/z_error.h"
#include "cpu/z_error_kernels.h"
#include "losses/names.h"
#include "losses/stats_count.h"
#include "ops/error.h"
#include "z_error/rows.h"

namespace fused_losses {
namespace {

constexpr std::int64_t kChunkRows = 8192;

const ZErrorKernels& z_kernels() {
    static const ZErrorKernels chosen = for_this_processor([]<Isa isa>() { return z_error_kernels<isa>(); });
    return chosen;
}

// The rows in pieces of `size`, the last may be shorter.
struct Chunks {
    std::int64_t rows, size, count;

    Chunks(const ZProblem& p, std::int64_t of_size) : rows(p.rows()), size(of_size), count(divide_up(rows, size)) {}

    // Chunks of at least so many rows that begin in column 0 (TaskColumns).
    static Chunks of_columns(const ZProblem& p, std::int64_t at_least) {
        const std::int64_t width = is_class(p.statistic) ? 1 : TaskColumns(p).width;
        return {p, divide_up(at_least, width) * width};
    }

    // Calls body(chunk, first row, end) for every chunk.
    template <class Body>
    void for_each(const Body& body) const {
        for_stealing(count, /*grain=*/1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t chunk = begin; chunk < end; ++chunk)
                body(chunk, chunk * size, std::min(rows, (chunk + 1) * size));
        });
    }
};

// What ZErrorIntervals points to.
class IntervalTable : public ZErrorIntervals {
public:
    explicit IntervalTable(const ZProblem& p) { is_class(p.statistic) ? list(p) : spread(p); }

private:
    void list(const ZProblem& p) {
        if (p.num_groups > p.rows()) return;
        rules.reserve(p.num_groups);
        for (std::int64_t group = 0; group < p.num_groups; ++group)
            rules.push_back(z_error::keep_interval_of(p, group));
        of_group = rules.data();
    }

    // Copies every task's rules to all of its columns.
    void spread(const ZProblem& p) {
        const TaskColumns columns(p);
        numbers.resize(columns.labels * kNumbers * columns.padded);
        for (std::int64_t group = 0; group < p.num_groups; ++group) {
            const KeepInterval rule = z_error::keep_interval_of(p, group);
            const double values[kNumbers] = {rule.mean, rule.std, rule.low, rule.high, rule.all ? 1.0 : 0.0};
            double* const of_label = numbers.data() + group % columns.labels * kNumbers * columns.padded;
            for (int i = 0; i < kNumbers; ++i)
                for (std::int64_t c = group / columns.labels; c < columns.width; c += columns.tasks)
                    of_label[i * columns.padded + c] = values[i];
        }
        of_column = numbers.data();
    }

    std::vector<KeepInterval> rules;
    std::vector<double> numbers;
};

// Where rows are judged by their cross entropy: computes it.
void compute_entropies(const ZProblem& p) {
    const EntropyScores& e = p.entropy;
    RowProblem rows;
    rows.reduction = Reduction::kNone;
    rows.dtype = dtype_of(e.logits.type);
    rows.index_type = index_type_of(p.target.type);
    rows.outer = p.outer;
    rows.inner = p.inner;
    rows.num_classes = p.num_groups;
    rows.logits = e.logits.data;
    rows.logits_stride = e.logits.stride;
    rows.logits_class_stride = e.class_stride;
    rows.target = p.target.data;
    rows.target_stride = p.target.stride;
    rows.ignore_index = p.ignore_index;
    rows.loss = index_of(AllLosses{}, CrossEntropy::name);
    rows.params[0] = e.label_smoothing;
    rows.class_factors = class_factors_of(rows.loss, rows.params, /*soft_target=*/false);
    rows.stats_count = stats_count_of(rows.loss, rows.class_factors);
    rows.logit_bias = e.logit_bias;
    rows.row_values = e.scores;
    cpu_row_loss(rows);
}

void write_scalar(const ZProblem& p, void* to, double x) {
    z_error::write(to, p.acc_is_double ? ElementType::kFloat64 : ElementType::kFloat32, 0, x);
}

void moments_of(const ZProblem& p, double* out) {
    // Every chunk has moments of every group: few chunks where there are many groups.
    constexpr std::int64_t max_chunks = 64;
    const std::int64_t groups = p.num_groups;
    if (is_class(p.statistic) && p.rows() <= 2 * groups) {
        std::fill(out, out + 3 * groups, 0.0);
        return z_kernels().sparse_moments(p, out);
    }
    const Chunks chunks = Chunks::of_columns(p, std::max({kChunkRows, 4 * groups, divide_up(p.rows(), max_chunks)}));
    std::vector<Moments> found(chunks.count * groups);
    chunks.for_each([&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        z_kernels().moments(p, begin, end, found.data() + chunk * groups);
    });
    for_stealing(groups, /*grain=*/1024, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t group = begin; group < end; ++group) {
            Moments total;
            for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) total.merge(found[chunk * groups + group]);
            out[group] = total.count;
            out[groups + group] = total.mean;
            out[2 * groups + group] = total.m2;
        }
    });
}

void check_labels(const ZProblem& p) {
    if (!is_binary(p.statistic)) return;
    const Chunks chunks(p, kChunkRows);
    std::vector<std::int64_t> bad(chunks.count);
    chunks.for_each([&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        bad[chunk] = z_kernels().find_bad_label(p, begin, end);
    });
    for (const std::int64_t row : bad)
        check_value(row < 0, "target must be in [0, 1], or NaN for a missing label, got ",
                    row < 0 ? 0.0 : z_error::Row(p, row).of<double>(p.target), " (entry ", row, ")");
}

void mask_of(const ZProblem& p) {
    const IntervalTable rules(p);
    Chunks::of_columns(p, kChunkRows).for_each([&](std::int64_t, std::int64_t begin, std::int64_t end) {
        z_kernels().mask(p, rules, begin, end);
    });
}

LossSums loss_of(const ZProblem& p) {
    const IntervalTable rules(p);
    const Chunks chunks = Chunks::of_columns(p, kChunkRows);
    std::vector<LossSums> sums(chunks.count);
    chunks.for_each([&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        sums[chunk] = z_kernels().loss(p, rules, begin, end);
    });
    LossSums total{};
    for (const LossSums& of_chunk : sums) total.add(of_chunk);
    return total;
}

// Whether no row has a finite score, and none is to be dropped therefore (z_error/rows.h). Once there is a mask.
bool nothing_is_judged(const ZProblem& p) {
    if (std::find(p.mask, p.mask + p.rows(), true) != p.mask + p.rows()) return false;  // nearly always
    std::vector<double> moments(3 * p.num_groups);
    moments_of(p, moments.data());
    return std::all_of(moments.begin(), moments.begin() + p.num_groups, [](double count) { return count == 0; });
}

ZProblem keeping_all(const ZProblem& p) {
    ZProblem all = p;
    all.keep_all = true;
    return all;
}

}  // namespace

void cpu_class_moments(const ZProblem& p, double* out) {
    if (p.entropy.logits.data) compute_entropies(p);
    check_labels(p);
    moments_of(p, out);
}

void cpu_update_moments(double* running, const double* batch, std::int64_t groups, double momentum, int) {
    update_running_moments(running, batch, groups, momentum, 0, groups);
}

void cpu_z_error_mask(const ZProblem& p) {
    mask_of(p);
    if (nothing_is_judged(p)) mask_of(keeping_all(p));
}

void cpu_z_error_loss(const ZProblem& p) {
    if (p.entropy.logits.data) compute_entropies(p);
    check_labels(p);
    if (p.own_moments) moments_of(p, p.own_moments);
    LossSums total = loss_of(p);
    if (nothing_is_judged(p)) total = loss_of(keeping_all(p));
    write_scalar(p, p.denominator, total.weight);
    if (p.reduction == Reduction::kMean) total.value = total.weight == 0 ? 0.0 : total.value / total.weight;
    if (p.reduction != Reduction::kNone) write_scalar(p, p.loss, total.value);
}

void cpu_z_error_gradient(const ZProblem& p) {
    Chunks(p, kChunkRows).for_each([&](std::int64_t, std::int64_t begin, std::int64_t end) {
        z_kernels().gradient(p, begin, end);
    });
}

}  // namespace fused_losses
