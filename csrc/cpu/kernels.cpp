// Compiled once per instruction set (FL_ISA), as the files of the kernels. These include no ATen header: their inline
// functions would leak AVX-512 code into the baseline.
#include "cpu/kernels.h"

#include "cpu/row_kernels.h"
#include "cpu/target_summary.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

void forward(const RowProblem& p, std::int64_t begin, std::int64_t end, LossSums* tile_sums) {
    is_multi_reduction_loss(p.loss) ? multi_reduction_forward(p, begin, end, tile_sums)
                                    : softmax_forward(p, begin, end, tile_sums);
}

void gradient(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    is_multi_reduction_loss(p.loss) ? multi_reduction_gradient(p, begin, end) : softmax_gradient(p, begin, end);
}

}  // namespace
}  // namespace FL_ISA

template <>
CpuKernels cpu_kernels<Isa::FL_ISA>() {
    return {&summarize_targets, &Entry<forward>::call, &bits_bytes, &Entry<gradient>::call};
}

}  // namespace fused_losses
