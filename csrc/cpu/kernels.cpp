// Compiled once per instruction set (FL_ISA). Includes no ATen header: their inline functions would leak AVX-512 code
// into the baseline.
#include "cpu/kernels.h"

#include "cpu/lane_tile.h"
#include "cpu/pass_tile.h"
#include "cpu/row_tile.h"
#include "cpu/target_summary.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// Calls body(kernel, outer, first, n, tile) for each tile in [begin, end).
template <class Kernel, class Body>
void for_tiles(const RowProblem& p, const Tiling& tiling, std::int64_t begin, std::int64_t end, Kernel& kernel,
               Body body) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
        const std::int64_t outer = tile / tiling.tiles_per_outer;
        const std::int64_t first = tile % tiling.tiles_per_outer * tiling.tile_rows;
        const int n = static_cast<int>(std::min(tiling.tile_rows, p.inner - first));
        body(kernel, outer, first, n, tile);
    }
}

template <class Body>
void with_bool(bool condition, Body body) {
    condition ? body(std::true_type{}) : body(std::false_type{});
}

template <class Stored, class Body>
void run(const RowProblem& p, std::int64_t begin, std::int64_t end, Body body) {
    const Tiling tiling(p);
    if (is_pass_loss(p.loss)) {
        const auto with_loss = [&]<class Loss>() {
            with_bool(tiling.lanes, [&](auto lanes) {
                PassTile<acc_t<Stored>, Loss, lanes> kernel(p, tiling.tile_rows);
                for_tiles(p, tiling, begin, end, kernel, body);
            });
        };
        visit_pass_loss(p.loss, [&]<class Loss>() {
            if constexpr (std::is_same_v<acc_t<Stored>, double>)  // for checking, not for speed: saves build time
                with_loss.template operator()<Loss>();
            else
                visit_variant<Loss>(p.params, with_loss);
        });
    } else if (tiling.lanes) {
        LaneTile<Stored> kernel(p, tiling.tile_rows);
        for_tiles(p, tiling, begin, end, kernel, body);
    } else {
        RowTile<Stored> kernel(p, tiling.tile_rows);
        for_tiles(p, tiling, begin, end, kernel, body);
    }
}

template <class Body>
void dispatch(const RowProblem& p, std::int64_t begin, std::int64_t end, Body body) {
    switch (p.dtype) {
        case Dtype::kFloat64: return run<double>(p, begin, end, body);
        case Dtype::kFloat32: return run<float>(p, begin, end, body);
        case Dtype::kFloat16: return run<Half>(p, begin, end, body);
        case Dtype::kBFloat16: return run<BFloat16>(p, begin, end, body);
    }
}

void forward(const RowProblem& p, std::int64_t begin, std::int64_t end, TileSums* tile_sums) {
    dispatch(p, begin, end, [&](auto& kernel, auto outer, auto first, int n, auto tile) {
        tile_sums[tile] = {};
        kernel.forward(outer, first, n, tile_sums[tile]);
    });
}

void gradient(const RowProblem& p, std::int64_t begin, std::int64_t end) {
    dispatch(p, begin, end,
             [](auto& kernel, auto outer, auto first, int n, auto) { kernel.backward(outer, first, n); });
}

}  // namespace
}  // namespace FL_ISA

template <>
CpuKernels cpu_kernels<Isa::FL_ISA>() {
    return {&summarize_targets, &forward, &gradient};
}

}  // namespace fused_losses
