// All losses, from the lists at the feet of their headers. A loss is chosen by its name; the index into CompiledLosses
// is what travels to a kernel.
#pragma once

#include "losses/cross_entropy.h"
#include "losses/eps_softmax.h"
#include "losses/ldr_kl.h"
#include "losses/margin.h"
#include "losses/mean_log.h"
#include "losses/nfl_sums.h"
#include "losses/normalized.h"
#include "losses/powers.h"
#include "losses/rescaled.h"
#include "losses/target_losses.h"
#include "losses/tempered.h"

namespace fused_losses {
inline namespace FL_ISA {

// Those of which ClassFactors may be kNone, first: their indices are the same in both lists.
using LossesWithoutFactors = decltype(LossesOfLogP{} + EpsSoftmaxLosses{} + MeanLogLosses{});
using SoftmaxLosses = decltype(LossesWithoutFactors{} + NormalizedSoftmaxLosses{});
using MultiReductionLosses = decltype(NormalizedMultiReductionLosses{} + PowerLosses{} + NFLSumLosses{} +
                                      TypeList<LDRKL, BiTempered>{} + MarginLosses{});
using AllLosses = decltype(SoftmaxLosses{} + MultiReductionLosses{});  // those of loss_names()

// What a wrapper makes of a loss: compiled as MultiReductionLosses are, but no choice of its own.
using WrappedLosses = TypeList<Rescaled>;
using CompiledLosses = decltype(AllLosses{} + WrappedLosses{});

FL_HD bool is_multi_reduction_loss(int index) { return index >= SoftmaxLosses::size; }

// visit_loss for what is compiled beside SoftmaxLosses; `index` counts in CompiledLosses.
template <class Visitor>
FL_HD void visit_multi_reduction_loss(int index, Visitor&& visitor) {
    visit_loss(decltype(MultiReductionLosses{} + WrappedLosses{}){}, index - SoftmaxLosses::size, visitor);
}

inline void derive_params(int loss, double* params) {
    visit_loss(CompiledLosses{}, loss, [&]<class Loss>() { derive_params<Loss>(params); });
}

// Calls body.operator()<Loss>() with Loss, or with one that computes the same for these parameters alone, but faster.
template <class Loss, class Body>
void visit_variant(const double* params, Body body) {
    if constexpr (requires { Loss::visit_variant(params, body); })
        Loss::visit_variant(params, body);
    else
        body.template operator()<Loss>();
}

}  // namespace FL_ISA
}  // namespace fused_losses
