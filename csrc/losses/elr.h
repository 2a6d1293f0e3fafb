// Early-learning regularisation (2007.00151): cross entropy and a term that pulls towards what the network used to say
// of the row's sample. Not a loss of the registry: it changes a memory.
#pragma once

#include "core/math.h"
#include "core/numeric.h"

namespace fused_losses {
inline namespace FL_ISA {

// With t the memory of the row's sample, s = <t, p> and c the probabilities p within [lowest, 1 - lowest],
//   t <- beta t + (1 - beta) c / sum c                              in training
//   value = -log p_y + lam log(1 - s)
//   dv/dz_j = p_j - [j = y] + lam (q_j - p_j), q_j = p_j (1 - t_j) / (1 - s)
// 1 - s is summed as sum p_j (1 - t_j), without cancellation.
struct ELR {
    static constexpr double lowest = 1e-4;

    template <class T>
    FL_HD static T clamped(T p) {
        const T low = T(math::scalar_t<T>(lowest)), high = T(math::scalar_t<T>(1 - lowest));
        return math::select(p < low, low, math::select(p > high, high, p));
    }

    // A memory of 1 would make the loss infinite; BFloat16 would round to it.
    template <class Kept, class T>
    FL_HD static T largest() {
        return T(sizeof(Kept) == 2 ? 1 - 1.0f / 256 : 1.0f);
    }

    // share: (1 - beta) / sum c
    template <class Kept, class T>
    FL_HD static T remembered(T t, T c, T beta, T share) {
        const T next = beta * t + share * c, most = largest<Kept, T>();
        return math::select(next > most, most, next);
    }

    // rest: 1 - s
    template <class T>
    FL_HD static T value(T log_p, T rest, T lam) {
        return lam * math::log(rest) - log_p;
    }

    // rest_share: lam / rest; of another class than the target
    template <class T>
    FL_HD static T gradient(T p, T t, T lam, T rest_share) {
        return p * ((T(1) - lam) + (T(1) - t) * rest_share);
    }

    template <class T>
    FL_HD static T target_gradient(T log_p, T t, T lam, T rest_share) {
        return math::expm1(log_p) + math::exp(log_p) * ((T(1) - t) * rest_share - lam);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
