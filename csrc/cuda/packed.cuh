// Logits as they travel, four bytes at a time: a float, or two numbers of 16 bits. And the exponential that each dtype
// has use for.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/math.h"
#include "core/numeric.h"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

template <class Stored>
struct Word;

template <>
struct Word<float> {
    static constexpr int count = 1;
    static constexpr unsigned lowest = 0xff800000u;  // -inf

    static FL_DEVICE unsigned of(float x, float) { return std::bit_cast<unsigned>(x); }
    static FL_DEVICE void widen(unsigned w, float* z) { z[0] = std::bit_cast<float>(w); }
    static FL_DEVICE unsigned narrow(const float* z) { return std::bit_cast<unsigned>(z[0]); }
    // NaN loses
    static FL_DEVICE unsigned larger(unsigned a, unsigned b) {
        return std::bit_cast<unsigned>(std::fmax(std::bit_cast<float>(a), std::bit_cast<float>(b)));
    }
};

template <class Stored>
struct PackedPair {
    static constexpr int count = 2;

    static FL_DEVICE void split(unsigned w, Stored (&x)[2]) { std::memcpy(x, &w, sizeof w); }
    static FL_DEVICE unsigned of(Stored first, Stored second) { return join({first, second}); }
    static FL_DEVICE unsigned join(const Stored (&x)[2]) {
        unsigned w;
        std::memcpy(&w, x, sizeof w);
        return w;
    }
    static FL_DEVICE void widen_each(unsigned w, float* z) {
        Stored x[2];
        split(w, x);
        z[0] = to_acc(x[0]), z[1] = to_acc(x[1]);
    }
    static FL_DEVICE unsigned narrow_each(const float* z) {
        return join({to_stored<Stored>(z[0]), to_stored<Stored>(z[1])});
    }
    static FL_DEVICE unsigned larger_each(unsigned a, unsigned b) {
        float x[2], y[2];
        widen_each(a, x), widen_each(b, y);
        const float larger[] = {std::fmax(x[0], y[0]), std::fmax(x[1], y[1])};
        return narrow_each(larger);
    }
};

template <>
struct Word<BFloat16> : PackedPair<BFloat16> {
    static constexpr unsigned lowest = 0xff80ff80u;

    static FL_DEVICE void widen(unsigned w, float* z) {
        z[0] = std::bit_cast<float>(w << 16), z[1] = std::bit_cast<float>(w & 0xffff0000u);
    }
#ifdef __CUDA_ARCH__
    static FL_DEVICE unsigned narrow(const float* z) {
        unsigned w;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(z[1]), "f"(z[0]));
        return w;
    }
    static FL_DEVICE unsigned larger(unsigned a, unsigned b) {
        unsigned w;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
        return w;
    }
#else
    static FL_DEVICE unsigned narrow(const float* z) { return narrow_each(z); }
    static FL_DEVICE unsigned larger(unsigned a, unsigned b) { return larger_each(a, b); }
#endif
};

template <>
struct Word<Half> : PackedPair<Half> {
    static constexpr unsigned lowest = 0xfc00fc00u;

    static FL_DEVICE void widen(unsigned w, float* z) { widen_each(w, z); }
#ifdef __CUDA_ARCH__
    static FL_DEVICE unsigned narrow(const float* z) {
        unsigned w;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(z[1]), "f"(z[0]));
        return w;
    }
    static FL_DEVICE unsigned larger(unsigned a, unsigned b) {
        unsigned w;
        asm("max.f16x2 %0, %1, %2;" : "=r"(w) : "r"(a), "r"(b));
        return w;
    }
#else
    static FL_DEVICE unsigned narrow(const float* z) { return narrow_each(z); }
    static FL_DEVICE unsigned larger(unsigned a, unsigned b) { return larger_each(a, b); }
#endif
};

// exp(z - pivot) for z <= pivot. Where gradients have 16 bits, as a power of two: a multiply-add and one more
// instruction. The pivot is then c / log2(e), not the number given, the same for all that is taken relative to it.
template <class Stored>
class Exponential {
    using A = acc_t<Stored>;
    static constexpr bool kAsPower = sizeof(Stored) == 2, kMayBeHuge = std::is_same_v<Stored, BFloat16>;
    static constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
    // From here on rounding moves the pivot so far that exponentials overflow. Logits that are so large and differ do
    // so by 64 at least, so that each has the exponential 1 or 0, whatever its base.
    static constexpr float kHuge = 0x1p30f;

public:
    FL_DEVICE explicit Exponential(A pivot)
        : scale(!kAsPower || (kMayBeHuge && std::fabs(pivot) >= kHuge) ? 1.0f : kLog2E), c(pivot * scale) {}

    // Of z from the pivot, in units of unit().
    FL_DEVICE A unit() const { return scale == A(1) ? A(1) : A(kLn2); }
    FL_DEVICE A argument(A z) const { return kAsPower ? std::fma(z, scale, -c) : z - c; }
    FL_DEVICE A distance(A z) const { return argument(z) * unit(); }
    FL_DEVICE A operator()(A z) const {
        if constexpr (kAsPower)
            return exp2_approximately(argument(z));
        else
            return math::exp_not_positive(argument(z));
    }

    // Of another pivot, not larger than this one. Where one is so huge that its base is another, it is 0.
    FL_DEVICE A of_pivot(const Exponential& other) const {
        if (scale != other.scale) return A(0);
        if constexpr (kAsPower)
            return exp2_approximately(other.c - c);
        else
            return math::exp_not_positive(other.c - c);
    }

    static FL_DEVICE A log(A sum) { return math::log_of_sum<kAsPower>(sum); }

private:
    A scale, c;
};

}  // namespace fused_losses::cuda
