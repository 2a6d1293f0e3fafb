// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/kernels.h"

#include "cpu/statistics_rows.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

void run(const RowProblem& p, const RowRuns& runs, std::int64_t begin, std::int64_t end) {
    visit_dtype(p.dtype, [&]<class Stored>() {
        StatisticsRows<Stored> rows(p);
        for (std::int64_t run = begin; run < end; ++run) {
            const std::int64_t first = run % runs.per_outer * runs.rows;
            rows.run(run / runs.per_outer, first, static_cast<int>(std::min(runs.rows, p.inner - first)));
        }
    });
}

}  // namespace
}  // namespace FL_ISA

template <>
RowStatisticsKernel row_statistics_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
