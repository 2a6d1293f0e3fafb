// The boundary between the operator entry code and the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <limits>

#include "core/row_problem.h"

namespace fused_losses {

// What a tile adds to the loss and, where the mean is over rows with a positive loss, to its denominator.
struct TileSums {
    double value = 0, weight = 0;
};

// Of a chunk of targets: the sum of their rows' weights, and the first row whose target is out of range.
struct TargetSummary {
    double weight = 0;
    std::int64_t bad_row = std::numeric_limits<std::int64_t>::max();
    std::int64_t bad_target = 0;

    bool is_bad() const { return bad_row != std::numeric_limits<std::int64_t>::max(); }
};

enum class Isa { baseline, avx2, avx512 };

struct CpuKernels {
    // Of the targets of rows [begin, end), with `other` of their second ones.
    TargetSummary (*summarize)(const RowProblem&, bool other, std::int64_t begin, std::int64_t end);
    // Forward of tiles [begin, end): row values or per-tile sums, stats, gradient, as the problem asks.
    void (*forward)(const RowProblem&, std::int64_t begin, std::int64_t end, TileSums* tile_sums);
    // Bytes of RowProblem::bits; 0 for losses whose gradient needs more than a bit per class.
    std::int64_t (*bits_bytes)(const RowProblem&);
    // Gradient of tiles [begin, end) from the stats forward has saved.
    void (*gradient)(const RowProblem&, std::int64_t begin, std::int64_t end);
};

// Each compilation of kernels.cpp defines one of these.
template <Isa>
CpuKernels cpu_kernels();
template <>
CpuKernels cpu_kernels<Isa::baseline>();
template <>
CpuKernels cpu_kernels<Isa::avx2>();
template <>
CpuKernels cpu_kernels<Isa::avx512>();

}  // namespace fused_losses
