// Compiled once per instruction set (FL_ISA). Includes no ATen header: their inline functions would leak AVX-512 code
// into the baseline.
#include "cpu/kernels.h"

#include "cpu/horizontal_softmax.h"
#include "cpu/multi_reduction_tile.h"
#include "cpu/target_summary.h"
#include "cpu/tiling.h"
#include "cpu/vertical_softmax.h"
#include "losses/run_as.h"

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

template <template <class> class View, class A>
std::int64_t bits_bytes_in(const RowProblem& p) {
    return p.outer * View<A>::bit_vectors_of_image(p) * std::int64_t(sizeof(VectorBits<A>));
}

std::int64_t bits_bytes(const RowProblem& p) {
    bool has_bits = false;
    if (is_multi_reduction_loss(p.loss))
        visit_multi_reduction_loss(p.loss, [&]<class Loss>() {
            if constexpr (kHasBits<Loss>) has_bits = Loss::bits_suffice(p.params);
        });
    if (!has_bits) return 0;
    if (p.dtype == Dtype::kFloat64) return bits_bytes_in<HorizontalView, double>(p);
    return Tiling(p).vertical ? bits_bytes_in<VerticalView, float>(p) : bits_bytes_in<HorizontalView, float>(p);
}

template <class A, class Loss, bool vertical, class Body>
void run_multi_reduction_tiles(const RowProblem& p, const Tiling& tiling, std::int64_t begin, std::int64_t end,
                               Body body) {
    MultiReductionTile<A, Loss, vertical> kernel(p, tiling.tile_rows);
    for_tiles(p, tiling, begin, end, kernel, body);
}

template <class Body>
void run_multi_reduction_loss(const RowProblem& given, std::int64_t begin, std::int64_t end, Body body) {
    const Tiling tiling(given);
    visit_multi_reduction_loss(given.loss, [&]<class Given>() {
        RowProblem p = given;
        RunAs<Given>::convert(p.params);
        using Loss = typename RunAs<Given>::type;
        // Doubles are for checking, not for speed: one kernel serves all shapes and parameters, which saves build time.
        if (p.dtype == Dtype::kFloat64)
            return run_multi_reduction_tiles<double, Loss, false>(p, tiling, begin, end, body);
        visit_variant<Loss>(p.params, [&]<class Variant>() {
            tiling.vertical ? run_multi_reduction_tiles<float, Variant, true>(p, tiling, begin, end, body)
                            : run_multi_reduction_tiles<float, Variant, false>(p, tiling, begin, end, body);
        });
    });
}

template <class Stored, class Body>
void run_softmax_loss(const RowProblem& p, std::int64_t begin, std::int64_t end, Body body) {
    const Tiling tiling(p);
    if (tiling.vertical) {
        VerticalSoftmax<Stored> kernel(p, tiling.tile_rows);
        for_tiles(p, tiling, begin, end, kernel, body);
    } else {
        HorizontalSoftmax<Stored> kernel(p, tiling.tile_rows);
        for_tiles(p, tiling, begin, end, kernel, body);
    }
}

template <class Body>
void dispatch(const RowProblem& p, std::int64_t begin, std::int64_t end, Body body) {
    if (is_multi_reduction_loss(p.loss)) return run_multi_reduction_loss(p, begin, end, body);
    visit_dtype(p.dtype, [&]<class Stored>() { run_softmax_loss<Stored>(p, begin, end, body); });
}

void forward(const RowProblem& p, std::int64_t begin, std::int64_t end, LossSums* tile_sums) {
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
    return {&summarize_targets, &Entry<forward>::call, &bits_bytes, &Entry<gradient>::call};
}

}  // namespace fused_losses
