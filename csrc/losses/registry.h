// The only list of losses in C++. A loss is chosen by its name; the index into this list is what travels to a kernel.
#pragma once

#include "losses/cross_entropy.h"
#include "losses/margin.h"
#include "losses/normalized.h"
#include "losses/target_losses.h"
#include "losses/tempered.h"

namespace fused_losses {
inline namespace FL_ISA {

using SoftmaxLosses = TypeList<CrossEntropy, OfTarget<MAE>, OfTarget<GCE>, OfTarget<AGCE>, OfTarget<AUE>, OfTarget<AE>,
                               OfTarget<RCE>, OfTarget<SCE>, OfTarget<TaylorCE>, OfTarget<PHuberCE>, OfTarget<JS>,
                               OfTarget<Focal>, OfTarget<BoundedCE>, NCE, NCEMAE, NCERCE, NCEAGCE>;
using PassLosses = TypeList<OfShares<NFL>, NGCE, OfShares<NFLMAE>, OfShares<NFLRCE>, BiTempered, HEM, MultiMargin>;

constexpr int kCrossEntropy = 0;  // its place in SoftmaxLosses

template <class... A, class... B>
TypeList<A..., B...> concatenate(TypeList<A...>, TypeList<B...>);

using AllLosses = decltype(concatenate(SoftmaxLosses{}, PassLosses{}));

FL_HD bool is_pass_loss(int index) { return index >= SoftmaxLosses::size; }

// Calls visitor.operator()<Loss>() for the loss at `index`.
template <class... Losses, class Visitor>
FL_HD void visit_loss(TypeList<Losses...>, int index, Visitor&& visitor) {
    int i = 0;
    ((i++ == index ? (visitor.template operator()<Losses>(), true) : false) || ...);
}

// The same for a loss of PassLosses; `index` counts in AllLosses.
template <class Visitor>
FL_HD void visit_pass_loss(int index, Visitor&& visitor) {
    visit_loss(PassLosses{}, index - SoftmaxLosses::size, visitor);
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
