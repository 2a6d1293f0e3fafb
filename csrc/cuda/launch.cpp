// Choosing kernels and grids.
#include "cuda/launch.cuh"

#include <algorithm>

#include "losses/stats_count.h"

namespace fused_losses::cuda {

bool rows_are_dense(const RowProblem& p, const RowStride& stride, std::int64_t class_stride) {
    return class_stride == 1 && p.outer == 1 && (stride.inner == p.num_classes || p.inner <= 1);
}

unsigned blocks_for(std::int64_t rows, std::int64_t rows_per_block) {
    const std::int64_t wanted = divide_up(rows, rows_per_block);
    return static_cast<unsigned>(std::clamp<std::int64_t>(wanted, 1, kMaxBlocks));
}

double assumed_denominator(const RowProblem& p) {
    if (p.reduction != Reduction::kMean || p.class_weight || p.sample_weight) return 0;
    const std::int64_t rows = p.rows();
    // In bytes that the device moves: a launch takes as long as so many of them, some 3 us. One call in so many has
    // rows that are ignored; then the logits are read, and the gradient is written, once more.
    constexpr std::int64_t launch = std::int64_t(8) << 20, calls = 8;
    const std::int64_t again = 2 * rows * p.num_classes * bytes_of(p.dtype);
    const std::int64_t counting = launch + rows * bytes_of(p.index_type);
    const bool none_is_ignored = !p.target;
    return none_is_ignored || again < calls * counting ? static_cast<double>(rows) : 0;
}

bool backward_recomputes(const RowProblem& p) {
    if (p.class_factors == ClassFactors::kClassLosses) return false;
    if (p.grad && !p.upstream) return true;  // forward writes the gradient, which will most likely do
    return p.dtype != Dtype::kFloat64 && p.num_classes <= most_classes_without_stats(p.loss);
}

}  // namespace fused_losses::cuda
