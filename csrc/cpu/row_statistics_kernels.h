// The boundary between the CPU driver of row statistics and its kernel, which is compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"

namespace fused_losses {

// Rows are cut into runs within an image, each a unit of parallel work.
struct StatisticsRuns {
    static constexpr std::int64_t kRows = 16;  // whole vectors of any instruction set

    std::int64_t per_outer, count;

    explicit StatisticsRuns(const RowProblem& p)
        : per_outer((p.inner + kRows - 1) / kRows), count(p.outer * per_outer) {}
};

// Of runs [begin, end): p.stats [kRowStatistics][rows], p.argmax [rows].
using RowStatisticsKernel = void (*)(const RowProblem& p, std::int64_t begin, std::int64_t end);

template <Isa>
RowStatisticsKernel row_statistics_kernel();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::baseline>();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::avx2>();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::avx512>();

}  // namespace fused_losses
