// CPU backend of row losses: picks the kernels for this processor and spreads tiles over threads.
#include <ATen/Parallel.h>

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

// Checks every target and returns the denominator of the mean. Chunks are fixed, so the sum has the same bits for any
// number of threads.
double check_targets(const RowProblem& p) {
    constexpr std::int64_t kChunk = 16384;
    const std::int64_t rows = p.rows(), chunks = (rows + kChunk - 1) / kChunk;
    std::vector<TargetSummary> summaries(chunks);
    at::parallel_for(0, chunks, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t c = begin; c < end; ++c)
            summaries[c] = kernels().summarize(p, c * kChunk, std::min(rows, (c + 1) * kChunk));
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
