// Instructions of the device, for floats. Those that stand for a function but for some ulp take and give normal
// numbers, or 0. On the host as exact as the library is; tests make them as inexact as they may be.
#pragma once

#include <cmath>

#include "core/host_device.h"

// Code of the device, or what tests run in its place.
#if defined(__CUDA_ARCH__) || defined(FL_CUDA_EMULATION)
#define FL_ON_DEVICE
#endif

#ifdef FL_CUDA_EMULATION
#include "approximate_instructions.h"
#endif

namespace fused_losses {
inline namespace FL_ISA {

#ifdef __CUDA_ARCH__
FL_HD float exp2_approximately(float x) {  // to 2 ulp
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FL_HD float log2_approximately(float x) {  // to 2^-22 in [0.5, 2], else 2 ulp
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FL_HD float rsqrt_approximately(float x) {  // to 2 ulp
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FL_HD float reciprocal_approximately(float x) {  // to an ulp; a division is ten instructions, and a branch
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#elif defined(FL_CUDA_EMULATION)
using cuda_emulation::exp2_approximately, cuda_emulation::log2_approximately, cuda_emulation::reciprocal_approximately,
    cuda_emulation::rsqrt_approximately;
#else
FL_HD float exp2_approximately(float x) { return std::exp2(x); }
FL_HD float log2_approximately(float x) { return std::log2(x); }
FL_HD float rsqrt_approximately(float x) { return 1.0f / std::sqrt(x); }
FL_HD float reciprocal_approximately(float x) { return 1.0f / x; }
#endif

// The larger; NaN stays NaN.
FL_HD float at_least(float x, float least) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(least));
    return y;
#else
    return x < least ? least : x;
#endif
}

}  // namespace FL_ISA
}  // namespace fused_losses
