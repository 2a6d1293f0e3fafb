// What kernels.cpp puts together, for one instruction set: the kernels of both kinds of losses, in files that are
// compiled side by side.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tiling.h"

namespace fused_losses {
inline namespace FL_ISA {

// As CpuKernels says.
void softmax_forward(const RowProblem& p, std::int64_t begin, std::int64_t end, LossSums* tile_sums);
void softmax_gradient(const RowProblem& p, std::int64_t begin, std::int64_t end);
void multi_reduction_forward(const RowProblem& p, std::int64_t begin, std::int64_t end, LossSums* tile_sums);
void multi_reduction_gradient(const RowProblem& p, std::int64_t begin, std::int64_t end);
std::int64_t bits_bytes(const RowProblem& p);

// Calls body(outer, first, n, tile) for each tile in [begin, end): its image, its first row there, its rows.
template <class Body>
void for_tiles(const RowProblem& p, const Tiling& tiling, std::int64_t begin, std::int64_t end, Body body) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
        const std::int64_t outer = tile / tiling.tiles_per_outer;
        const std::int64_t first = tile % tiling.tiles_per_outer * tiling.tile_rows;
        const int n = static_cast<int>(std::min(tiling.tile_rows, p.inner - first));
        body(outer, first, n, tile);
    }
}

// Of a kernel that works tile by tile.
template <class Kernel>
void forward_of_tiles(const RowProblem& p, const Tiling& tiling, std::int64_t begin, std::int64_t end,
                      LossSums* tile_sums) {
    Kernel kernel(p, tiling.tile_rows);
    for_tiles(p, tiling, begin, end, [&](std::int64_t outer, std::int64_t first, int n, std::int64_t tile) {
        tile_sums[tile] = {};
        kernel.forward(outer, first, n, tile_sums[tile]);
    });
}

template <class Kernel>
void gradient_of_tiles(const RowProblem& p, const Tiling& tiling, std::int64_t begin, std::int64_t end) {
    Kernel kernel(p, tiling.tile_rows);
    for_tiles(p, tiling, begin, end,
              [&](std::int64_t outer, std::int64_t first, int n, std::int64_t) { kernel.backward(outer, first, n); });
}

}  // namespace FL_ISA
}  // namespace fused_losses
