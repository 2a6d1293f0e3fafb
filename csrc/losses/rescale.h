// Logits whose norm is fixed (LogitNorm) or bounded (LogitClip) before a loss sees them. Torch-free.
#pragma once

#include "core/math.h"
#include "core/row_problem.h"

namespace fused_losses {

// Besides a RowProblem, whose grad is what is written: the rescaled logits (acc), backward the gradient (dtype).
// Ignored rows become zeros; without targets there are none.
struct LogitRescale {
    bool clips = false;               // LogitClip, else LogitNorm
    double parameter = 1;             // the largest norm, or the temperature
    const void* on_device = nullptr;  // acc; read by the kernel in its place
    void* norms = nullptr;            // acc [rows], made by forward
    const void* upstream = nullptr;   // acc, the gradient in the rescaled logits; null: forward
    RowStride upstream_stride;
    std::int64_t upstream_class_stride = 1;
};

inline namespace FL_ISA {

// Rescaled are f z, with f a function of the norm n of z: 1 / (t (n + guard)), or min(1, tau / n). The gradient of v in
// z is f g + (f' <z, g> / n) z, with g that in f z. Classes masked by -inf have no part in the norm. Where the sum of
// squares overflows, f is not quite 0: a masked class stays one.
template <class T>
struct RescaleFactor {
    static constexpr double guard = 1e-7;

    T factor, slope;  // slope: f' / n, 0 for a row of zeros

    FL_HD RescaleFactor(bool clips, T parameter, T norm) {
        const T least = T(std::numeric_limits<math::scalar_t<T>>::min());
        const T length = clips ? norm : norm + T(guard);
        const T changed = clips ? parameter / length : T(1) / (parameter * length);
        const T steep = math::select(norm == T(0), T(0), -changed / length / norm);
        factor = math::select(changed < least, least, changed), slope = steep;
        if (!clips) return;
        const auto is_long = norm > parameter;
        factor = math::select(is_long, factor, T(1));
        slope = math::select(is_long, slope, math::select(norm == norm, T(0), norm));
    }
};

template <class T>
FL_HD T unless_masked(T z) {
    return math::select(z == T(-std::numeric_limits<math::scalar_t<T>>::infinity()), T(0), z);
}

}  // namespace FL_ISA
}  // namespace fused_losses
