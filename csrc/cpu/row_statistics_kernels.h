// The boundary between the CPU driver of row statistics and its kernel, which is compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"

namespace fused_losses {

// Rows are cut into runs within an image, each a unit of parallel work.
struct RowRuns {
    std::int64_t rows, per_outer;
};

// Writes p.row_statistics and p.argmax of the rows in runs [begin, end).
using RowStatisticsKernel = void (*)(const RowProblem& p, const RowRuns& runs, std::int64_t begin, std::int64_t end);

template <Isa>
RowStatisticsKernel row_statistics_kernel();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::baseline>();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::avx2>();
template <>
RowStatisticsKernel row_statistics_kernel<Isa::avx512>();

}  // namespace fused_losses
