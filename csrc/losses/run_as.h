// Losses that equal another one with other parameters. Their kernels are compiled once.
#pragma once

#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

// The loss that runs in place of Loss, and how its parameters follow.
template <class Loss>
struct RunAs {
    using type = Loss;
    static void convert(double*) {}
};
template <>
struct RunAs<NormalizedLoss<NFLRCE>> {  // its passive loss has MAE's formula
    using type = NormalizedLoss<NFLMAE>;
    static void convert(double*) {}
};
template <>
struct RunAs<NormalizedLoss<NFL>> {
    using type = NormalizedLoss<NFLMAE>;
    static void convert(double* params) {  // gamma, detach -> alpha, beta, gamma, detach, scale
        const double converted[] = {1, 0, params[0], params[1], 0};
        for (const double param : converted) *params++ = param;
    }
};

template <class Named>
struct RunAs<NormalizedLoss<AsNFLSum<Named>>> {
    using type = NormalizedLoss<NFLSum>;
    static void convert(double* params) {
        double own[Named::num_params];
        for (int i = 0; i < Named::num_params; ++i) own[i] = params[i];
        Named::expand(own, params);
    }
};

// kRule and what becomes of the only parameter.
template <int kRule>
struct RunAsPower {
    using type = PowerLoss<AnyPowerRule>;
    static void convert(double* params) {
        const double own = params[0];
        params[0] = kRule == 2 ? 2 : own;
        params[1] = kRule;
        params[2] = own;
    }
};
template <>
struct RunAs<NGCE> : RunAsPower<0> {};
template <>
struct RunAs<SGCE> : RunAsPower<1> {};
template <>
struct RunAs<AMSE> : RunAsPower<2> {};

template <>
struct RunAs<HEM> {
    using type = MarginLoss<AnyMarginPolicy>;
    static void convert(double* params) {  // margin, margin_index
        const double converted[] = {params[0], 1, 1, 1, params[1]};
        for (const double param : converted) *params++ = param;
    }
};
template <>
struct RunAs<MultiMargin> {
    using type = MarginLoss<AnyMarginPolicy>;
    static void convert(double* params) { params[4] = 0; }
};

// Calls body.operator()<Loss>() with what runs in place of the multi-reduction loss; params become those of Loss.
template <class Body>
void visit_multi_reduction_as_run(int loss, double* params, Body body) {
    visit_multi_reduction_loss(loss, [&]<class Given>() {
        RunAs<Given>::convert(params);
        body.template operator()<typename RunAs<Given>::type>();
    });
}

}  // namespace FL_ISA
}  // namespace fused_losses
