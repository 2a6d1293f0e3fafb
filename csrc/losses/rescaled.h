// LogitNorm and LogitClip of a loss of log p_y, from one read of the logits: the norm is the first pass's.
#pragma once

#include "core/multi_reduction_loss.h"
#include "losses/rescale.h"
#include "losses/target_losses.h"

namespace fused_losses {
inline namespace FL_ISA {

// One of them, by its place in the list. Not inlined: all the formulas in every kernel only take time to compile, and
// on CUDA the registers that hold a row.
template <class T>
FL_HD_NOINLINE ValueSlope<T> any_of_log_p(int loss, T log_p, const T* params) {
    const T nan = T(std::numeric_limits<math::scalar_t<T>>::quiet_NaN());
    ValueSlope<T> of{nan, nan};
    visit_loss(LossesOfLogP{}, loss, [&]<class Loss>() {
        const AffineRow<T> affine = Loss::eval(SoftmaxRow<T>{log_p, T(0), T(0), T(1), T(1)}, params);
        of = {affine.value, affine.beta};
    });
    return of;
}

template <class T>
FL_HD ValueSlope<T> of_log_p(int loss, T log_p, const T* params) {
    return loss == kCrossEntropy ? PlainCrossEntropy::eval(log_p, params) : any_of_log_p(loss, log_p, params);
}

// params: temperature or largest norm (which RowInputs::margin holds, for it may be a tensor), whether it is the
// latter, the bias of the target's rescaled logit, the loss by its place, the loss's own parameters.
//
// With s_j = f z_j + bias [j = y] and t = log softmax(s)_y, the gradient of phi(t) in s is phi' ([j = y] - p_j), and in
// z (losses/rescale.h) f times that plus a multiple of z_j:  -(f' / n) phi' sum_k p_k (z_k - z_y). The target is left
// out of all sums. So no digits of a row that is nearly certain are lost: its 1 - p_y is the others' share, and
// differences from z_y do not cancel.
//
// kCoarse: logits and gradient are numbers of 16 bits.
template <bool kCoarse = false>
struct RescaledOf {
    using Coarse = RescaledOf<true>;

    static constexpr const char *name = "rescaled_logits", *tensor_param = "t or tau";
    static constexpr int num_params = 7, num_sums = 2, num_early_sums = 1, num_kept = 2;
    static constexpr bool needs_max = true;

    static void derive(double* params) {
        visit_loss(LossesOfLogP{}, static_cast<int>(params[3]), [&]<class Loss>() { derive_params<Loss>(params + 4); });
    }

    template <class T>
    struct State {
        T factor, max;      // f, and the largest logit
        T shift;            // how far the target's s is above f max: exponentials are of what is below either
        T target_logit;     // 0 if it is masked; in the end the value
        T per_logit;        // slope of RescaleFactor; in the end of z_j in dL/dz_j
        T per_exponential;  // in dL/dz_j
        T target_grad;
    };

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        State<T> s{};
        s.max = row.max;
        s.target_logit = unless_masked(row.target_logit);
        return s;
    }

    // Early: the square. Kept: the exponential; the logit, 0 if it is masked.
    template <bool last, class T>
    FL_HD static Sums<T, 2> map(int, const State<T>& s, T z, T, math::mask_t<T> is_target, const T*, T* kept) {
        const T length = unless_masked(z);
        if (!last) return {{math::select(is_target, T(0), length * length), T(0)}};
        const T e = math::select(is_target, T(0), math::exp_not_positive<kCoarse>(below(s, z)));
        if (kept) kept[0] = e, kept[1] = length;
        return {{e, e * (length - s.target_logit)}};
    }

    template <class T>
    FL_HD static void finalize(int pass, State<T>& s, const Sums<T, 2>& sums, const RowInputs<T>& row,
                               const T* params) {
        if (pass == 0) {
            const T norm = math::sqrt(sums.v[0] + s.target_logit * s.target_logit);
            const RescaleFactor<T> by(math::to_scalar(params[1]) > math::scalar_t<T>(0), row.margin, norm);
            s.factor = by.factor;
            s.per_logit = by.slope;
            s.shift = math::larger(target_above(s, row, params), T(0));
            return;
        }
        const T distance = target_above(s, row, params) - s.shift, own = math::exp_not_positive(distance);
        const T others = sums.v[0], total = others + own, of_one = math::reciprocal(total);
        const T log_p = distance - math::log_near_one(total, others + (own - T(1)));
        const ValueSlope<T> phi = of_log_p(static_cast<int>(math::to_scalar(params[3])), log_p, params + 4);
        // Where the factor does not change, differences of logits may overflow.
        const T along = -phi.slope * (sums.v[1] * of_one);
        s.per_logit = math::select(s.per_logit == T(0), s.per_logit, s.per_logit * along);
        s.per_exponential = -s.factor * phi.slope * of_one;
        s.target_grad = s.factor * phi.slope * (others * of_one) + s.per_logit * s.target_logit;
        s.target_logit = phi.value;
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.target_logit;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T, math::mask_t<T>, const T*, T* kept) {
        kept[0] = math::exp_not_positive<kCoarse>(below(s, z));
        kept[1] = unless_masked(z);
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T*) {
        return math::select(is_target, s.target_grad, s.per_exponential * kept[0] + s.per_logit * kept[1]);
    }

    template <class T>
    FL_HD static void scale(State<T>& s, T by) {
        s.per_logit *= by;
        s.per_exponential *= by;
        s.target_grad *= by;
    }

private:
    template <class T>
    FL_HD static T target_above(const State<T>& s, const RowInputs<T>& row, const T* params) {
        return s.factor * (row.target_logit - s.max) + params[2];
    }

    // At most 0, which f z - (f max + shift) need not be: f may be large, and multiplication and addition fused.
    template <class T>
    FL_HD static T below(const State<T>& s, T z) {
        return s.factor * (z - s.max) - s.shift;
    }
};

using Rescaled = RescaledOf<>;

}  // namespace FL_ISA
}  // namespace fused_losses
