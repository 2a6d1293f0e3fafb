// Choosing kernels and grids.
#include "cuda/launch.cuh"

#include <algorithm>
#include <cstdlib>

namespace fused_losses::cuda {
namespace {

// Whether the rows follow each other without gaps.
bool is_dense(const RowProblem& p, const RowStride& stride, std::int64_t class_stride) {
    return class_stride == 1 && p.outer == 1 && (stride.inner == p.num_classes || p.inner <= 1);
}

}  // namespace

Regime regime_of(const RowProblem& p) {
    constexpr std::int64_t lanes_classes = 256, warp_classes = 1024;
    const Regime long_row = p.num_classes <= warp_classes ? Regime::kWarp : Regime::kBlock;
    if (p.dtype == Dtype::kFloat64) return long_row;  // kIsForChecking
    const bool dense = is_dense(p, p.logits_stride, p.logits_class_stride) &&
                       (!p.grad || is_dense(p, p.grad_stride, p.grad_class_stride));
    if (dense && p.num_classes <= kStagedClasses) return Regime::kStaged;
    if (p.num_classes <= kFewClasses) return Regime::kThread;
    // NCHW: neighbouring threads read neighbouring pixels, if there are enough of them to fill the device.
    const bool pixels_adjacent = std::abs(p.logits_stride.inner) < std::abs(p.logits_class_stride);
    if (pixels_adjacent && p.inner > 1 && p.rows() >= p.num_classes) return Regime::kThread;
    return p.num_classes <= lanes_classes ? Regime::kLanes : long_row;
}

int threads_of(Regime regime, bool passes) {
    if (regime == Regime::kBlock) return kBlock;
    return regime == Regime::kLanes && !passes ? kLanes : 32;
}

unsigned blocks_for(std::int64_t rows, std::int64_t rows_per_block) {
    const std::int64_t wanted = (rows + rows_per_block - 1) / rows_per_block;
    return static_cast<unsigned>(std::clamp<std::int64_t>(wanted, 1, kMaxBlocks));
}

cudaError_t find_resident_blocks(const void* kernel, std::int64_t& blocks) {
    int device = 0, multiprocessors = 0, per_multiprocessor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kBlock, 0);
    blocks = std::int64_t(multiprocessors) * per_multiprocessor;
    return error;
}

}  // namespace fused_losses::cuda
