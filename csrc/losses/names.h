// From names of losses to their places in the registry and back: for host code alone, kernels know indices.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class... Losses>
std::vector<std::string> names_of(TypeList<Losses...>) {
    return {Losses::name...};
}

template <class... Losses>
int index_of(TypeList<Losses...>, std::string_view name) {
    int index = 0;
    const bool found = ((name == Losses::name || (++index, false)) || ...);
    return found ? index : -1;
}

template <class... Losses>
const char* name_of(TypeList<Losses...>, int index) {
    static constexpr const char* kNames[] = {Losses::name...};
    return kNames[index];
}

inline std::vector<std::string> loss_names() { return names_of(AllLosses{}); }

}  // namespace FL_ISA
}  // namespace fused_losses
