// Row losses on the CPU: picks the kernels for this processor and spreads tiles over threads.
#include <bit>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/choose_isa.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/tiling.h"
#include "cpu/work_stealing.h"
#include "cpu/z_error.h"
#include "losses/registry.h"
#include "ops/backend.h"
#include "ops/error.h"

namespace fused_losses {
namespace {

const CpuKernels& kernels() {
    static const CpuKernels chosen = for_this_processor([]<Isa isa>() { return cpu_kernels<isa>(); });
    return chosen;
}

// Checks every target and returns the sum of their rows' weights, by which the mean divides. Chunks are fixed, so the
// sum has the same bits for any number of threads.
double check_and_weigh_targets(const RowProblem& p, bool other = false) {
    constexpr std::int64_t kChunk = 8192;
    const std::int64_t rows = p.rows(), chunks = divide_up(rows, kChunk);
    std::vector<TargetSummary> summaries(chunks);
    for_stealing(chunks, /*grain=*/4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = begin; c < end; ++c)
            summaries[c] = kernels().summarize(p, other, c * kChunk, std::min(rows, (c + 1) * kChunk));
    });
    double weight = 0;
    for (const TargetSummary& s : summaries) {
        check_class(!s.is_bad(), s.bad_target, s.bad_row, p.num_classes, p.ignore_index);
        weight += s.weight;
    }
    return weight;
}

// Tiles per task, so that a task is worth a thread.
std::int64_t grain_size(const RowProblem& p, const Tiling& tiling) {
    constexpr std::int64_t kElements = 32768;
    return std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(1, tiling.tile_rows * p.num_classes));
}

RowStatisticsKernel statistics_kernel() {
    static const RowStatisticsKernel chosen =
        for_this_processor([]<Isa isa>() { return row_statistics_kernel<isa>(); });
    return chosen;
}

// Kernels of softmax losses compute row statistics, too. After others, piece by piece, logits are still in cache.
LossSums run_tiles(const RowProblem& p) {
    const Tiling tiling(p);
    const std::int64_t grain = grain_size(p, tiling);
    const RowRuns runs{tiling.tile_rows, tiling.tiles_per_outer};
    std::vector<LossSums> sums(tiling.tiles);
    for_stealing(tiling.tiles, grain, [&](std::int64_t begin, std::int64_t end) {
        if (!p.argmax || !is_multi_reduction_loss(p.loss)) return kernels().forward(p, begin, end, sums.data());
        for (; begin < end; begin += grain) {
            const std::int64_t piece_end = std::min(begin + grain, end);
            kernels().forward(p, begin, piece_end, sums.data());
            statistics_kernel()(p, runs, begin, piece_end);
        }
    });
    LossSums total{};
    for (const LossSums& of_tile : sums) total.add(of_tile);
    return total;
}

// A number as kernels read it: double where the logits are double, else float.
class Scalar {
public:
    explicit Scalar(double x) : as_double(x), as_float(static_cast<float>(x)) {}

    const void* pointer(const RowProblem& p) const {
        return p.dtype == Dtype::kFloat64 ? static_cast<const void*>(&as_double) : &as_float;
    }

    void write(const RowProblem& p, void* to) const {
        if (p.dtype == Dtype::kFloat64)
            *static_cast<double*>(to) = as_double;
        else
            *static_cast<float*>(to) = as_float;
    }

private:
    const double as_double;
    const float as_float;
};

void gradient(const RowProblem& p) {
    prefer_huge_pages(p);
    const Tiling tiling(p);
    for_stealing(tiling.tiles, grain_size(p, tiling),
                 [&](std::int64_t begin, std::int64_t end) { kernels().gradient(p, begin, end); });
}

// Targets may have changed since forward: torch does not see what NumPy writes into memory that they share.
void gradient_of_saved(const RowProblem& p) {
    check_and_weigh_targets(p);
    gradient(p);
}

// The mean over active rows divides by their number, which is known only after all rows. So a second run over the tiles
// writes the gradient. Where the first run leaves a bit per class, the second one does not read the logits.
LossSums run_tiles_then_gradient(RowProblem p) {
    void* const grad = std::exchange(p.grad, nullptr);
    const std::int64_t stats_bytes = p.stats_count * p.rows() * (p.dtype == Dtype::kFloat64 ? 8 : 4);
    const std::int64_t bits_bytes = kernels().bits_bytes(p);
    // Not tensors: a small block behind the gradient could keep the allocator from reusing the gradient's memory.
    const auto scratch = std::make_unique_for_overwrite<char[]>(stats_bytes + bits_bytes);
    p.stats = scratch.get();
    p.bits = bits_bytes > 0 ? scratch.get() + stats_bytes : nullptr;
    const LossSums total = run_tiles(p);
    const Scalar active(total.weight + kActiveGuard);
    p.grad = grad;
    p.denominator = active.pointer(p);
    gradient(p);
    return total;
}

// Rows with two labels. Where all rows have one lam, each label has a mean of its own; with a lam per row there is
// one mean of both.
void take_means_of_labels(RowProblem& p) {
    const double weights[] = {check_and_weigh_targets(p), check_and_weigh_targets(p, /*other=*/true)};
    if (p.reduction != Reduction::kMean) return;
    for (int k = 0; k < 2; ++k) {
        const double weight = p.lam ? weights[0] + weights[1] : weights[k];
        p.label_scale[k] = weight == 0 ? 0.0 : 1 / weight;
    }
    p.reduction = Reduction::kSum;
}

void forward(RowProblem& p, void* loss, void* denominator) {
    if (p.other_target) take_means_of_labels(p);
    const double weight = p.other_target ? 1.0 : check_and_weigh_targets(p);
    prefer_huge_pages(p);
    const Scalar divisor(weight);
    if (denominator) divisor.write(p, denominator);
    if (p.written_upstream && !p.upstream) Scalar(1).write(p, p.written_upstream);
    if (p.reduction == Reduction::kMean) p.denominator = divisor.pointer(p);
    const bool active_mean = p.reduction == Reduction::kActiveMean;
    const LossSums total = active_mean && p.grad ? run_tiles_then_gradient(p) : run_tiles(p);
    if (!loss || p.reduction == Reduction::kNone) return;
    const double active = total.weight + kActiveGuard;
    if (active_mean && denominator) Scalar(active).write(p, denominator);
    const double by = active_mean ? active : (p.reduction == Reduction::kMean ? weight : 1.0);
    Scalar(by == 0 ? 0.0 : total.value / by).write(p, loss);
}

void statistics(const RowProblem& p) {
    check_and_weigh_targets(p);
    constexpr std::int64_t kRows = 16, kElements = 32768;  // whole vectors of any instruction set
    const RowRuns runs{kRows, divide_up(p.inner, kRows)};
    const std::int64_t of_run = kRows * std::max<std::int64_t>(1, p.num_classes);
    for_stealing(p.outer * runs.per_outer, std::max<std::int64_t>(1, kElements / of_run),
                 [&](std::int64_t begin, std::int64_t end) { statistics_kernel()(p, runs, begin, end); });
}

// Calls body(begin, end) for runs of rows that are worth a thread.
template <class Body>
void for_rows(const RowProblem& p, const Body& body) {
    constexpr std::int64_t kElements = 8192;
    for_stealing(p.rows(), std::max<std::int64_t>(1, kElements / p.num_classes), body);
}

// Whether a number occurs twice.
bool has_repeats(const std::int64_t* numbers, std::int64_t count) {
    const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(2 * count))));
    const std::uint64_t mask = (std::uint64_t(1) << bits) - 1;
    std::vector<std::int64_t> table(mask + 1, -1);
    for (std::int64_t i = 0; i < count; ++i) {
        std::uint64_t at = static_cast<std::uint64_t>(numbers[i]) * 0x9e3779b97f4a7c15u >> (64 - bits);
        while (table[at] >= 0 && table[at] != numbers[i]) at = (at + 1) & mask;
        if (table[at] >= 0) return true;
        table[at] = numbers[i];
    }
    return false;
}

void elr(const RowProblem& p, const ElrMemory& given) {
    static const ElrKernel kernel = for_this_processor([]<Isa isa>() { return elr_kernel<isa>(); });
    check_and_weigh_targets(p);
    ElrMemory m = given;
    const std::int64_t rows = p.rows();
    std::vector<std::int64_t> order;
    if (m.updates && !m.order && has_repeats(m.place, rows)) {
        order.resize(rows);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](std::int64_t a, std::int64_t b) { return m.place[a] < m.place[b]; });
        m.order = order.data();
    }
    for_rows(p, [&](std::int64_t begin, std::int64_t end) { kernel(p, m, begin, end); });
}

void rescale(const RowProblem& p, const LogitRescale& of) {
    static const RescaleKernel kernel = for_this_processor([]<Isa isa>() { return rescale_kernel<isa>(); });
    for_rows(p, [&](std::int64_t begin, std::int64_t end) { kernel(p, of, begin, end); });
}

void gjs(const RowProblem& p, const GjsViews& views) {
    static const GjsKernel kernel = for_this_processor([]<Isa isa>() { return gjs_kernel<isa>(); });
    const double labelled = check_and_weigh_targets(p);
    check_index(labelled == double(p.rows()), "gjs: every target must be in [0, ", p.num_classes, "), got ",
                p.ignore_index);
    for_rows(p, [&](std::int64_t begin, std::int64_t end) { kernel(p, views, begin, end); });
}

}  // namespace

void cpu_row_loss(RowProblem& p) { forward(p, nullptr, nullptr); }

const Backend cpu_backend{&forward,
                          &gradient_of_saved,
                          [](const RowProblem&) { return false; },
                          [](const RowProblem&) -> std::int64_t { return 0; },
                          &statistics,
                          &elr,
                          &rescale,
                          &gjs,
                          &cpu_class_moments,
                          &cpu_z_error_mask,
                          &cpu_z_error_loss,
                          &cpu_z_error_gradient,
                          &cpu_update_moments};

}  // namespace fused_losses
