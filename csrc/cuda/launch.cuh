// Choosing and launching a kernel. What needs no kernel's type is in launch.cpp: nvcc reads a source several times.
#pragma once

#include <compare>
#include <type_traits>

#include "core/numeric.h"
#include "cuda/launch.h"

namespace fused_losses::cuda {

constexpr int kBlock = 256;  // threads per block of most kernels

// Blocks that must fit on a multiprocessor: lets row kernels use 64 registers a thread (128 for doubles).
// Left alone, the compiler spills some of them for an occupancy that these kernels do not need.
template <class A, bool kHeavy = false>
constexpr int kMinBlocks = sizeof(A) == 8 ? 2 : (kHeavy ? 3 : 4);

// Doubles are for checking, not for speed: one kernel serves all shapes and losses, which saves build time.
template <class Stored>
constexpr bool kIsForChecking = std::is_same_v<Stored, double>;

// Blocks for `rows` rows at `rows_per_block`, one at least: sums over no rows have to be written, too.
unsigned blocks_for(std::int64_t rows, std::int64_t rows_per_block);

struct BlockShape {
    int threads = kBlock, bytes = 0, cluster = 1;  // bytes of dynamic shared memory
    bool overlaps = false;                         // may begin before the kernel before it has ended

    auto operator<=>(const BlockShape&) const = default;
};

// How many such blocks the current device runs at the same time, and its multiprocessors. Remembers the answers: a
// small kernel takes less time than the questions.
cudaError_t find_resident_blocks(const void* kernel, const BlockShape& shape, std::int64_t& blocks);
cudaError_t find_multiprocessors(int& count);
// Whether a kernel's code for the current device has instructions of sm_90.
cudaError_t find_hopper_code(const void* kernel, bool& has);

// Calls enqueue(problem, direction) for a gradient.
template <class Enqueue>
cudaError_t enqueue_backward(RowProblem p, Enqueue enqueue) {
    if (p.rows() == 0) return cudaSuccess;
    if (p.stats) return enqueue(p, Direction::kBackward);
    p.row_values = nullptr;  // not to be written again
    return enqueue(p, Direction::kBackwardRecompute);
}

// Whether the rows follow each other without gaps.
bool rows_are_dense(const RowProblem& p, const RowStride& stride, std::int64_t class_stride);

// A launch of `blocks` blocks. Not to be copied: it points into itself.
struct ClusterLaunch {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};

    ClusterLaunch(const BlockShape& shape, std::int64_t blocks, cudaStream_t stream) {
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(shape.threads);
        config.dynamicSmemBytes = static_cast<std::size_t>(shape.bytes);
        config.stream = stream;
        config.attrs = attributes;
        if (shape.cluster > 1) {
            cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
            cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        }
        if (shape.overlaps) {
            cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
            overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            overlap.val.programmaticStreamSerializationAllowed = 1;
        }
    }
    ClusterLaunch(const ClusterLaunch&) = delete;
};

// Plain C++, without <<<>>>: tests/cpp/cuda_emulation runs the kernels on the host.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned blocks, cudaStream_t stream, const Args&... args) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlock);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// For kernels that loop over rows: as many blocks as the device runs at the same time, one for `rows_per_block` rows at
// most. (A kernel that finds its work done before still has to launch all of them.)
template <class... Params, class... Args>
cudaError_t launch_over_rows(void (*kernel)(Params...), std::int64_t rows, std::int64_t rows_per_block,
                             cudaStream_t stream, const Args&... args) {
    unsigned blocks = blocks_for(rows, rows_per_block);
    std::int64_t resident = 1;
    if (blocks > 1)
        if (const cudaError_t error = find_resident_blocks(reinterpret_cast<const void*>(kernel), {}, resident);
            error != cudaSuccess)
            return error;
    if (blocks > resident && resident > 0) blocks = static_cast<unsigned>(resident);
    return launch(kernel, blocks, stream, args...);
}

// For kernels whose blocks wait for each other (grid.cuh), so that all of them must be resident: as many as fit,
// `wanted` at most. A stream that has a part of the device alone may not have room for them, but for one.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), std::int64_t wanted, cudaStream_t stream,
                               const Args&... args) {
    if (wanted == 1) return launch(kernel, 1, stream, args...);
    std::int64_t resident = 0;
    const cudaError_t error = find_resident_blocks(reinterpret_cast<const void*>(kernel), {}, resident);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute cooperative;
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(wanted < resident ? wanted : resident);
    config.blockDim = kBlock;
    config.stream = stream;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    const cudaError_t answer = cudaLaunchKernelEx(&config, kernel, args...);
    if (answer != cudaErrorCooperativeLaunchTooLarge) return answer;
    cudaGetLastError();
    return launch(kernel, 1, stream, args...);
}

}  // namespace fused_losses::cuda
