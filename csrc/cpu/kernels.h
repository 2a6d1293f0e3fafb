// The boundary between the operator entry code and the CPU kernels, which are compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/row_problem.h"

namespace fused_losses {
inline namespace FL_ISA {

// How rows are cut into units of parallel work. It depends on the problem alone, never on the number of threads, and
// each tile's partial sum is added in tile order: the same bits for any number of threads.
struct Tiling {
    static constexpr int kFewClasses = 100;  // of more, and of doubles, rows are faster one by one
    static constexpr int kFewDoubles = 32;
    static constexpr int kFewRows = 64;  // stay in L1 up to kFullRows classes, then half as many do
    static constexpr int kFullRows = 32;
    static constexpr int kPixels = 256;                     // runs of memory long enough for the prefetchers
    static constexpr std::int64_t kMaxTileClasses = 512;    // more: smaller tiles, so that they stay in L2
    static constexpr std::int64_t kMaxLaneClasses = 8192;   // a tile of kFewRows rows then fills 2 MiB
    static constexpr std::int64_t kRowTileElements = 4096;  // 16 KiB of floats: exponentials stay in L1

    bool lanes;  // vector lanes are rows (few classes, or classes far apart), else lanes are classes
    std::int64_t tile_rows, tiles_per_outer, tiles;

    explicit Tiling(const RowProblem& p) {
        const bool few = p.num_classes <= (p.dtype == Dtype::kFloat64 ? kFewDoubles : kFewClasses);
        const bool pixels = p.logits_class_stride != 1 && p.inner > 1 && p.num_classes <= kMaxLaneClasses;
        lanes = few || pixels;
        const std::int64_t fitting = kRowTileElements / std::max<std::int64_t>(p.num_classes, 1);
        const bool large = pixels && p.num_classes <= kMaxTileClasses;
        const int few_rows = few && p.num_classes > kFullRows ? kFewRows / 2 : kFewRows;
        tile_rows = lanes ? (large ? kPixels : few_rows) : std::clamp<std::int64_t>(fitting, 1, 16);
        tiles_per_outer = (p.inner + tile_rows - 1) / tile_rows;
        tiles = p.outer * tiles_per_outer;
    }
};

}  // namespace FL_ISA

// What a tile adds to the loss and, where the mean is over rows with a positive loss, to its denominator.
struct TileSums {
    double value = 0, weight = 0;
};

// What a chunk of targets says: the sum of its rows' weights and the first row that is out of range.
struct TargetSummary {
    double weight = 0;
    std::int64_t bad_row = std::numeric_limits<std::int64_t>::max();
    std::int64_t bad_target = 0;

    bool is_bad() const { return bad_row != std::numeric_limits<std::int64_t>::max(); }
};

enum class Isa { baseline, avx2, avx512 };

struct CpuKernels {
    // Looks at the targets of rows [begin, end).
    TargetSummary (*summarize)(const RowProblem&, std::int64_t begin, std::int64_t end);
    // Forward of tiles [begin, end): row values or per-tile sums, stats, gradient, as the problem asks.
    void (*forward)(const RowProblem&, std::int64_t begin, std::int64_t end, TileSums* tile_sums);
    // Size of RowProblem::bits; 0 where they do not say enough.
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
