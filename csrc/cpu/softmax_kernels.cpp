// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/horizontal_softmax.h"
#include "cpu/row_kernels.h"
#include "cpu/vertical_softmax.h"

namespace fused_losses {
inline namespace FL_ISA {

void softmax_forward(const RowProblem& p, std::int64_t begin, std::int64_t end, LossSums* tile_sums) {
    const Tiling tiling(p);
    visit_dtype(p.dtype, [&]<class Stored>() {
        tiling.vertical ? forward_of_tiles<VerticalSoftmax<Stored>>(p, tiling, begin, end, tile_sums)
                        : forward_of_tiles<HorizontalSoftmax<Stored>>(p, tiling, begin, end, tile_sums);
    });
}

void softmax_gradient(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    const Tiling tiling(p);
    visit_dtype(p.dtype, [&]<class Stored>() {
        tiling.vertical ? gradient_of_tiles<VerticalSoftmax<Stored>>(p, tiling, begin, end)
                        : gradient_of_tiles<HorizontalSoftmax<Stored>>(p, tiling, begin, end);
    });
}

}  // namespace FL_ISA
}  // namespace fused_losses
