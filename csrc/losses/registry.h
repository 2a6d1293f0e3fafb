// All losses, from the lists at the feet of their headers. A loss is chosen by its name; the index into this list is
// what travels to a kernel.
#pragma once

#include <cstddef>
#include <tuple>

#include "losses/cross_entropy.h"
#include "losses/eps_softmax.h"
#include "losses/ldr_kl.h"
#include "losses/margin.h"
#include "losses/mean_log.h"
#include "losses/nfl_sums.h"
#include "losses/normalized.h"
#include "losses/powers.h"
#include "losses/target_losses.h"
#include "losses/tempered.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class... A, class... B>
TypeList<A..., B...> operator+(TypeList<A...>, TypeList<B...>);

using SoftmaxLosses = decltype(TypeList<CrossEntropy>{} + TargetLosses{} + EpsSoftmaxLosses{} + MeanLogLosses{} +
                               NormalizedSoftmaxLosses{});
using MultiReductionLosses = decltype(NormalizedMultiReductionLosses{} + PowerLosses{} + NFLSumLosses{} +
                                      TypeList<LDRKL, BiTempered>{} + MarginLosses{});
using AllLosses = decltype(SoftmaxLosses{} + MultiReductionLosses{});

constexpr int kCrossEntropy = 0;  // its place in SoftmaxLosses

FL_HD bool is_multi_reduction_loss(int index) { return index >= SoftmaxLosses::size; }

// Of the losses `begin` to `end`, by halving: a kernel that chooses once a row takes five steps, not one for each loss.
template <class Losses, std::size_t begin, std::size_t end, class Visitor>
FL_HD void visit_between(unsigned index, Visitor& visitor) {
    if constexpr (end - begin == 1) {
        visitor.template operator()<std::tuple_element_t<begin, Losses>>();
    } else {
        constexpr std::size_t middle = (begin + end) / 2;
        if (index < middle)
            visit_between<Losses, begin, middle>(index, visitor);
        else
            visit_between<Losses, middle, end>(index, visitor);
    }
}

// Calls visitor.operator()<Loss>() for the loss at `index`, if there is one.
template <class... Losses, class Visitor>
FL_HD void visit_loss(TypeList<Losses...>, int index, Visitor&& visitor) {
    const auto place = static_cast<unsigned>(index);
    if (place < sizeof...(Losses)) visit_between<std::tuple<Losses...>, 0, sizeof...(Losses)>(place, visitor);
}

// The same for a loss of MultiReductionLosses; `index` counts in AllLosses.
template <class Visitor>
FL_HD void visit_multi_reduction_loss(int index, Visitor&& visitor) {
    visit_loss(MultiReductionLosses{}, index - SoftmaxLosses::size, visitor);
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
