// CPU backend of row losses: picks the kernels for this processor and spreads tiles over threads.
#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "cpu/choose_isa.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "ops/backend.h"

namespace fused_losses {
namespace {

const CpuKernels& kernels() {
    static const CpuKernels chosen = for_this_processor([]<Isa isa>() { return cpu_kernels<isa>(); });
    return chosen;
}

// What one chunk of targets says: the sum of its rows' weights and the first row that is out of range.
struct TargetSummary {
    double weight = 0;
    std::int64_t bad_row = std::numeric_limits<std::int64_t>::max();
    std::int64_t bad_target = 0;

    bool is_bad() const { return bad_row != std::numeric_limits<std::int64_t>::max(); }
};

// Rows [begin, end) of image `outer` without weights: a loop without branches.
template <class Index>
TargetSummary count(const RowProblem& p, std::int64_t outer, std::int64_t begin, std::int64_t end) {
    const Index* const targets = static_cast<const Index*>(p.target) + p.target_stride.at(outer, 0);
    const std::int64_t stride = p.target_stride.inner, ignore_index = p.ignore_index;
    const auto num_classes = static_cast<std::uint64_t>(p.num_classes);
    std::int64_t counted = 0, bad = 0;
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t y = targets[i * stride];
        const std::int64_t counts = y != ignore_index;
        counted += counts;
        bad += counts & (static_cast<std::uint64_t>(y) >= num_classes);
    }
    TargetSummary summary{double(counted)};
    for (std::int64_t i = begin; i < end && bad; ++i) {
        const std::int64_t y = targets[i * stride];
        if (y == ignore_index || static_cast<std::uint64_t>(y) < num_classes) continue;
        summary.bad_row = outer * p.inner + i;
        summary.bad_target = y;
        break;
    }
    return summary;
}

template <class Index, class A>
TargetSummary weigh(const RowProblem& p, std::int64_t outer, std::int64_t begin, std::int64_t end) {
    TargetSummary summary = p.target ? count<Index>(p, outer, begin, end) : TargetSummary{double(end - begin)};
    const auto* weights = p.target ? static_cast<const A*>(p.class_weight) : nullptr;
    const auto* samples = static_cast<const A*>(p.sample_weight);
    if (summary.is_bad() || (!weights && !samples)) return summary;
    summary.weight = 0;
    for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t y =
            p.target ? static_cast<const Index*>(p.target)[p.target_stride.at(outer, i)] : std::int64_t(0);
        if (p.target && y == p.ignore_index) continue;
        const double weight = weights ? double(weights[y]) : 1.0;
        summary.weight += samples ? weight * double(samples[p.sample_weight_stride.at(outer, i)]) : weight;
    }
    return summary;
}

// Rows [begin, end) in the order of their numbers.
template <class Index, class A>
TargetSummary summarize(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    TargetSummary total;
    while (begin < end && !total.is_bad()) {
        const std::int64_t outer = begin / p.inner, i = begin % p.inner;
        const std::int64_t n = std::min(end - begin, p.inner - i);
        const TargetSummary part = weigh<Index, A>(p, outer, i, i + n);
        total = {total.weight + part.weight, part.bad_row, part.bad_target};
        begin += n;
    }
    return total;
}

template <class Index>
TargetSummary summarize(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    return p.dtype == Dtype::kFloat64 ? summarize<Index, double>(p, begin, end)
                                      : summarize<Index, float>(p, begin, end);
}

TargetSummary summarize(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    switch (p.index_type) {
        case IndexType::kInt32: return summarize<std::int32_t>(p, begin, end);
        case IndexType::kInt16: return summarize<std::int16_t>(p, begin, end);
        case IndexType::kUInt8: return summarize<std::uint8_t>(p, begin, end);
        default: return summarize<std::int64_t>(p, begin, end);
    }
}

// Checks every target and returns the denominator of the mean. Chunks are fixed, so the sum has the same bits for any
// number of threads.
double check_targets(const RowProblem& p) {
    constexpr std::int64_t kChunk = 16384;
    const std::int64_t rows = p.rows(), chunks = (rows + kChunk - 1) / kChunk;
    std::vector<TargetSummary> summaries(chunks);
    at::parallel_for(0, chunks, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = begin; c < end; ++c)
            summaries[c] = summarize(p, c * kChunk, std::min(rows, (c + 1) * kChunk));
    });
    double weight = 0;
    for (const TargetSummary& s : summaries) {
        TORCH_CHECK_INDEX(!s.is_bad(), "target must be in [0, ", p.num_classes,
                          ") or equal ignore_index=", p.ignore_index, ": Target ", s.bad_target,
                          " is out of bounds (row ", s.bad_row, ")");
        weight += s.weight;
    }
    return weight;
}

// Tiles per task, so that a task is worth a thread.
std::int64_t grain_size(const RowProblem& p, const Tiling& tiling) {
    constexpr std::int64_t kElements = 32768;
    return std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(1, tiling.tile_rows * p.num_classes));
}

void write_scalar(const at::Tensor& out, double value) {
    if (out.scalar_type() == at::kDouble)
        *out.mutable_data_ptr<double>() = value;
    else
        *out.mutable_data_ptr<float>() = static_cast<float>(value);
}

void forward(RowProblem& p, const at::Tensor& loss, const at::Tensor& denominator) {
    const double weight = check_targets(p);
    prefer_huge_pages(p);
    const float weight_float = static_cast<float>(weight);
    if (denominator.defined()) write_scalar(denominator, weight);
    if (p.reduction == Reduction::kMean)
        p.denominator = p.dtype == Dtype::kFloat64 ? static_cast<const void*>(&weight) : &weight_float;
    const Tiling tiling(p);
    std::vector<TileSums> sums(tiling.tiles);
    at::parallel_for(0, tiling.tiles, grain_size(p, tiling),
                     [&](std::int64_t begin, std::int64_t end) { kernels().forward(p, begin, end, sums.data()); });
    if (!loss.defined() || p.reduction == Reduction::kNone) return;
    TileSums total;
    for (const TileSums& sum : sums) total.value += sum.value, total.weight += sum.weight;
    if (p.reduction == Reduction::kActiveMean) {
        const double active = total.weight + kActiveGuard;
        write_scalar(loss, total.value / active);
        if (denominator.defined()) write_scalar(denominator, active);
        return;
    }
    write_scalar(loss, p.reduction == Reduction::kSum ? total.value : (weight == 0 ? 0.0 : total.value / weight));
}

void gradient(const RowProblem& p) {
    prefer_huge_pages(p);
    const Tiling tiling(p);
    at::parallel_for(0, tiling.tiles, grain_size(p, tiling),
                     [&](std::int64_t begin, std::int64_t end) { kernels().gradient(p, begin, end); });
}

}  // namespace

Backend cpu_backend() { return {&forward, &gradient}; }

}  // namespace fused_losses
