// Choosing and launching a kernel.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "core/numeric.h"
#include "cuda/launch.h"

namespace fused_losses::cuda {

constexpr int kBlock = 256;  // threads per block of every kernel

// Blocks that must fit on a multiprocessor: lets row kernels use 64 registers a thread (128 for doubles).
// Left alone, the compiler spills some of them for an occupancy that these kernels do not need.
template <class A, bool kHeavy = false>
constexpr int kMinBlocks = sizeof(A) == 8 ? 2 : (kHeavy ? 3 : 4);

// Doubles are for checking, not for speed: one kernel serves all shapes and losses, which saves build time.
template <class Stored>
constexpr bool kIsForChecking = std::is_same_v<Stored, double>;

// Who works on a row. Every kernel is right for any shape and strides; the choice is about speed.
// kStaged: a thread, on rows that the block has brought to shared memory.
// kLanes: a part of a warp, so that a warp has enough to read at a time.
enum class Regime { kStaged, kThread, kLanes, kWarp, kBlock };

constexpr int kStagedClasses = 32;
constexpr int kFewClasses = 16;
constexpr int kLanes = 8;

// Whether the rows follow each other without gaps.
inline bool is_dense(const RowProblem& p, const RowStride& stride, std::int64_t class_stride) {
    return class_stride == 1 && p.outer == 1 && (stride.inner == p.num_classes || p.inner <= 1);
}

inline Regime regime_of(const RowProblem& p) {
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

// Threads of a Group (team.cuh). Sums of several passes are reduced over whole warps.
inline int threads_of(Regime regime, bool passes) {
    if (regime == Regime::kBlock) return kBlock;
    return regime == Regime::kLanes && !passes ? kLanes : 32;
}

// Calls body.operator()<Stored, kSpread>() for the problem's dtype; kSpread says that u_j may be needed.
template <class Body>
cudaError_t dispatch(const RowProblem& p, Body body) {
    const auto with = [&]<class Stored>() {
        [[maybe_unused]] const bool spread = p.spread != Spread::kNone;
        if constexpr (!kIsForChecking<Stored>)
            if (!spread) return body.template operator()<Stored, false>();
        return body.template operator()<Stored, true>();
    };
    switch (p.dtype) {
        case Dtype::kFloat64: return with.template operator()<double>();
        case Dtype::kFloat32: return with.template operator()<float>();
        case Dtype::kFloat16: return with.template operator()<Half>();
        case Dtype::kBFloat16: return with.template operator()<BFloat16>();
    }
    return cudaErrorInvalidValue;
}

// Blocks for `rows` rows at `rows_per_block`, one at least: sums over no rows have to be written, too.
inline unsigned blocks_for(std::int64_t rows, std::int64_t rows_per_block) {
    const std::int64_t wanted = (rows + rows_per_block - 1) / rows_per_block;
    return static_cast<unsigned>(std::clamp<std::int64_t>(wanted, 1, kMaxBlocks));
}

// Plain C++, without <<<>>>: tests/cpp/cuda_emulation runs the kernels on the host.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned blocks, cudaStream_t stream, const Args&... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlock);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// For kernels whose blocks wait for each other (grid.cuh), so that all of them must be resident: as many as fit,
// `wanted` at most.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), std::int64_t wanted, cudaStream_t stream,
                               const Args&... args) {
    if (wanted == 1) return launch(kernel, 1, stream, args...);
    int device = 0, multiprocessors = 0, per_multiprocessor = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kBlock, 0);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cooperative;
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(std::min(wanted, std::int64_t(multiprocessors) * per_multiprocessor));
    config.blockDim = kBlock;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace fused_losses::cuda
