// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/multi_reduction_tile.h"
#include "cpu/row_kernels.h"
#include "losses/run_as.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// Calls body.operator()<Kernel>(problem of the loss that is run) with the MultiReductionTile for it.
template <class Body>
void visit_kernel(const RowProblem& given, const Tiling& tiling, Body body) {
    RowProblem p = given;
    visit_multi_reduction_as_run(p.loss, p.params, [&]<class Loss>() {
        // Doubles are for checking, not for speed: one kernel serves all shapes and parameters, which saves build time.
        if (p.dtype == Dtype::kFloat64) return body.template operator()<MultiReductionTile<double, Loss, false>>(p);
        visit_variant<Loss>(p.params, [&]<class Variant>() {
            tiling.vertical ? body.template operator()<MultiReductionTile<float, Variant, true>>(p)
                            : body.template operator()<MultiReductionTile<float, Variant, false>>(p);
        });
    });
}

template <template <class> class View, class A>
std::int64_t bits_bytes_in(const RowProblem& p) {
    return p.outer * View<A>::bit_vectors_of_image(p) * std::int64_t(sizeof(VectorBits<A>));
}

}  // namespace

void multi_reduction_forward(const RowProblem& given, std::int64_t begin, std::int64_t end, LossSums* tile_sums) {
    const Tiling tiling(given);
    visit_kernel(given, tiling, [&]<class Kernel>(const RowProblem& p) {
        forward_of_tiles<Kernel>(p, tiling, begin, end, tile_sums);
    });
}

void multi_reduction_gradient(const RowProblem& given, std::int64_t begin, std::int64_t end) {
    const Tiling tiling(given);
    visit_kernel(given, tiling,
                 [&]<class Kernel>(const RowProblem& p) { gradient_of_tiles<Kernel>(p, tiling, begin, end); });
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

}  // namespace FL_ISA
}  // namespace fused_losses
