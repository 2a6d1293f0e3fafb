// The boundary between the drivers of row losses on the CPU and their kernels, which are compiled once per instruction
// set.
#pragma once

#include <cstdint>
#include <limits>

#include "core/elr_memory.h"
#include "core/loss_sums.h"
#include "core/row_problem.h"
#include "losses/gjs.h"
#include "losses/rescale.h"

namespace fused_losses {

// Of a chunk of targets: the sum of their rows' weights, and the first row whose target is out of range.
struct TargetSummary {
    double weight = 0;
    std::int64_t bad_row = std::numeric_limits<std::int64_t>::max();
    std::int64_t bad_target = 0;

    bool is_bad() const { return bad_row != std::numeric_limits<std::int64_t>::max(); }
};

// Rows are cut into runs within an image, each a unit of parallel work.
struct RowRuns {
    std::int64_t rows, per_outer;
};

enum class Isa { baseline, avx2, avx512 };

// name<isa>(), which each compilation of the kernels' source defines for one instruction set.
#define FL_FOR_EACH_ISA(Kernels, name) \
    template <Isa>                     \
    Kernels name();                    \
    template <>                        \
    Kernels name<Isa::baseline>();     \
    template <>                        \
    Kernels name<Isa::avx2>();         \
    template <>                        \
    Kernels name<Isa::avx512>()

struct CpuKernels {
    // Of the targets of rows [begin, end), with `other` of their second ones.
    TargetSummary (*summarize)(const RowProblem&, bool other, std::int64_t begin, std::int64_t end);
    // Forward of tiles [begin, end): row values or per-tile sums, stats, gradient, as the problem asks. Only where the
    // mean is over rows with a positive loss, their weights are added up.
    void (*forward)(const RowProblem&, std::int64_t begin, std::int64_t end, LossSums* tile_sums);
    // Bytes of RowProblem::bits; 0 for losses whose gradient needs more than a bit per class.
    std::int64_t (*bits_bytes)(const RowProblem&);
    // Gradient of tiles [begin, end) from the stats forward has saved.
    void (*gradient)(const RowProblem&, std::int64_t begin, std::int64_t end);
};

FL_FOR_EACH_ISA(CpuKernels, cpu_kernels);

// Writes p.row_statistics and p.argmax of the rows in runs [begin, end).
using RowStatisticsKernel = void (*)(const RowProblem& p, const RowRuns& runs, std::int64_t begin, std::int64_t end);
FL_FOR_EACH_ISA(RowStatisticsKernel, row_statistics_kernel);

// Of units [begin, end): p.row_values, p.grad (acc) if there is one, and the memory.
using ElrKernel = void (*)(const RowProblem& p, const ElrMemory& m, std::int64_t begin, std::int64_t end);
FL_FOR_EACH_ISA(ElrKernel, elr_kernel);

// Of rows [begin, end).
using RescaleKernel = void (*)(const RowProblem& p, const LogitRescale& of, std::int64_t begin, std::int64_t end);
FL_FOR_EACH_ISA(RescaleKernel, rescale_kernel);

// Of rows [begin, end): values and gradients.
using GjsKernel = void (*)(const RowProblem& p, const GjsViews& views, std::int64_t begin, std::int64_t end);
FL_FOR_EACH_ISA(GjsKernel, gjs_kernel);

}  // namespace fused_losses
