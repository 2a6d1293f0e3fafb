// How rows are cut into tiles, the units of parallel work, and which way vectors lie in them. It depends on the problem
// alone, never on the number of threads, and each tile's partial sum is added in tile order: the same bits for any
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/row_problem.h"

namespace fused_losses {
inline namespace FL_ISA {

struct Tiling {
    // Up to so many classes a tile is vertical; with more, rows are faster one by one.
    static constexpr int kVerticalClasses = 100, kVerticalDoubleClasses = 32;
    // Of a vertical tile: so many rows stay in L1 up to kL1Classes classes, then half as many do.
    static constexpr int kVerticalRows = 64, kL1Classes = 32;
    static constexpr int kPixels = 256;                        // runs of memory long enough for the prefetchers
    static constexpr std::int64_t kPixelClasses = 512;         // more: kVerticalRows, so that they stay in L2
    static constexpr std::int64_t kMaxPixelClasses = 8192;     // a tile of kVerticalRows then fills 2 MiB
    static constexpr std::int64_t kHorizontalElements = 4096;  // 16 KiB of floats: exponentials stay in L1

    // The elements of a vector are rows (few classes, or classes far apart in memory); otherwise they are classes.
    bool vertical;
    std::int64_t tile_rows, tiles_per_outer, tiles;

    explicit Tiling(const RowProblem& p) {
        const bool few = p.num_classes <= (p.dtype == Dtype::kFloat64 ? kVerticalDoubleClasses : kVerticalClasses);
        const bool pixels = p.logits_class_stride != 1 && p.inner > 1 && p.num_classes <= kMaxPixelClasses;
        vertical = few || pixels;
        tile_rows = vertical ? vertical_rows(p, few, pixels) : horizontal_rows(p);
        tiles_per_outer = divide_up(p.inner, tile_rows);
        tiles = p.outer * tiles_per_outer;
    }

private:
    static int vertical_rows(const RowProblem& p, bool few, bool pixels) {
        if (pixels && p.num_classes <= kPixelClasses) return kPixels;
        return few && p.num_classes > kL1Classes ? kVerticalRows / 2 : kVerticalRows;
    }

    static std::int64_t horizontal_rows(const RowProblem& p) {
        return std::clamp<std::int64_t>(kHorizontalElements / std::max<std::int64_t>(p.num_classes, 1), 1, 16);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
