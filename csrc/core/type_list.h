// Lists of losses, of which one is chosen by its place at run time.
#pragma once

#include <cstddef>
#include <tuple>

#include "core/host_device.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class... Losses>
struct TypeList {
    static constexpr int size = sizeof...(Losses);
};

template <class... A, class... B>
TypeList<A..., B...> operator+(TypeList<A...>, TypeList<B...>);

// Of the losses `begin` to `end`, by halving: a kernel that chooses once a row takes five steps, not one for each loss.
template <class Losses, std::size_t begin, std::size_t end, class Visitor>
FL_HD auto visit_between(unsigned index, Visitor& visitor) {
    if constexpr (end - begin == 1) {
        return visitor.template operator()<std::tuple_element_t<begin, Losses>>();
    } else {
        constexpr std::size_t middle = (begin + end + 1) / 2;
        if (index < middle) return visit_between<Losses, begin, middle>(index, visitor);
        return visit_between<Losses, middle, end>(index, visitor);
    }
}

// What visitor.operator()<Loss>() returns for the loss at `index`, which must be one of the list's, `first` or later.
template <std::size_t first = 0, class... Losses, class Visitor>
FL_HD auto visit_known_loss(TypeList<Losses...>, int index, Visitor&& visitor) {
    return visit_between<std::tuple<Losses...>, first, sizeof...(Losses)>(static_cast<unsigned>(index), visitor);
}

// Calls visitor.operator()<Loss>() for the loss at `index`, if there is one.
template <class... Losses, class Visitor>
FL_HD void visit_loss(TypeList<Losses...> losses, int index, Visitor&& visitor) {
    if (static_cast<unsigned>(index) < sizeof...(Losses)) visit_known_loss(losses, index, visitor);
}

}  // namespace FL_ISA
}  // namespace fused_losses
