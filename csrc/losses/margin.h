// Losses of the margin errors e_j = max(0, z_j - (z_y - margin)), j != y: no softmax. They stop pushing once every
// other logit is `margin` below the target's.
#pragma once

#include "core/multi_reduction_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// Kept are the errors that are positive and at or above the threshold, the mean of all K errors (that of the target is
// 0 and counts); without a threshold all positive ones. The value is the sum of e^p, p = 1 or 2, over K, or for p = 1
// over their number. Threshold and number are constants for the gradient. MarginPolicy says what the parameters mean;
// params[0] is the margin.
template <class MarginPolicy>
struct MarginLoss {
    static constexpr const char* name = MarginPolicy::name;
    static constexpr int num_params = MarginPolicy::num_params, num_sums = 2, num_early_sums = 1, num_kept = 1;
    static constexpr bool needs_max = false, has_margin = true;
    static constexpr const char* tensor_param = "margin";

    // Logits, margins and errors are in units in which no error and no sum of errors of finite logits overflows.
    static constexpr float unit = 1.0f / (1 << 24);

    template <class T>
    struct State {
        // Errors above `below` are kept; dL/de is per_error e^(p-1), and `powers` is the sum of e^(p-1): their number.
        T target_logit, margin, below, per_error, powers, value;
    };

    // Calls body.operator()<Loss>() with the loss that knows whether there is a threshold, and p. Not both: squares
    // have none.
    template <class Body>
        requires requires { typename MarginPolicy::template Knowing<true, false>; }
    static void visit_variant(const double* params, Body body) {
        if (MarginPolicy::has_threshold(params))
            body.template operator()<MarginLoss<typename MarginPolicy::template Knowing<true, false>>>();
        else if (MarginPolicy::is_squared(params))
            body.template operator()<MarginLoss<typename MarginPolicy::template Knowing<false, true>>>();
        else
            body.template operator()<MarginLoss<typename MarginPolicy::template Knowing<false, false>>>();
    }

    // The threshold is the first pass's.
    template <class T>
    FL_HD static int passes(const T* params) {
        return MarginPolicy::has_threshold(params) ? 2 : 1;
    }

    // With a masked target (-inf) all other classes have an infinite error: here the largest that is finite.
    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        const T target_logit = math::select(row.target_logit < lowest<T>(), lowest<T>(), row.target_logit);
        return {T(unit) * target_logit, T(unit) * row.margin, T(0), T(0), T(0), T(0)};
    }

    template <class T>
    FL_HD static T lowest() {
        return T(std::numeric_limits<math::scalar_t<T>>::lowest());
    }

    template <class T>
    FL_HD static math::mask_t<T> has_masked_target(const State<T>& s) {
        return s.target_logit <= T(unit) * lowest<T>();
    }

    // NaN and +inf stay what they are. A masked class (-inf) has no error.
    template <class T>
    FL_HD static T error(const State<T>& s, T z, T margin, math::mask_t<T> is_target, const T* params) {
        const T of_class = math::select(MarginPolicy::competitors_margin(params), T(unit) * margin, s.margin);
        const T e = math::select(is_target, T(0), (T(unit) * z - s.target_logit) + of_class);
        return math::not_negative(e);
    }

    template <class T>
    FL_HD static T nan() {
        return T(std::numeric_limits<math::scalar_t<T>>::quiet_NaN());
    }

    // NaN is not, so that it spoils the sum.
    template <class T>
    FL_HD static math::mask_t<T> is_dropped(const State<T>& s, T e) {
        return e <= s.below;
    }

    // The sum of all errors times this is below their mean, by what rounding may have added to the sum: where all
    // errors but the target's are the same, they are above the mean by a K-th only, and must be kept. Kernels add 256 +
    // K / 1024 terms in turn at most, and are wrong by far less than as many roundings: 2^17 classes need no allowance
    // for that.
    template <class T>
    FL_HD static T below_mean(T classes) {
        constexpr math::scalar_t<T> rounding = std::numeric_limits<math::scalar_t<T>>::epsilon() / 2;
        const T in_turn = math::select(classes > T(1 << 17), T(512) + classes * T(1.0f / 1024), T(0));
        return (T(1) - (in_turn + T(16)) * T(rounding)) * math::reciprocal(classes);
    }

    // e^(p-1) of errors that are kept, else 0: what is dropped is finite.
    template <class T>
    FL_HD static T power(const State<T>& s, T e, const T* params) {
        const T is_kept = math::select(is_dropped(s, e), T(0), T(1));
        return MarginPolicy::is_squared(params) ? e * is_kept : is_kept;
    }

    // Kept: the error, in the end its power.
    template <bool last, class T>
    FL_HD static Sums<T, 2> map(int, const State<T>& s, T z, T margin, math::mask_t<T> is_target, const T* params,
                                T* kept) {
        const bool again = last && MarginPolicy::has_threshold(params);
        const T e = again && kept ? *kept : error(s, z, margin, is_target, params);
        if (!last) {
            if (kept) *kept = e;
            return {{e, T(0)}};
        }
        const T of = power(s, e, params);
        if (kept) *kept = of;
        return {{e * of, of}};
    }

    template <class T>
    FL_HD static void finalize(int pass, State<T>& s, const Sums<T, 2>& sums, const RowInputs<T>& row,
                               const T* params) {
        if (pass == 0 && MarginPolicy::has_threshold(params)) {
            s.below = math::select(has_masked_target(s), T(0), sums.v[0] * below_mean(row.num_classes));
            return;
        }
        const bool squared = MarginPolicy::is_squared(params);
        s.powers = sums.v[1];
        // One logit of +inf or NaN spoils the row: a factor of every gradient carries it. Squares overflow without one.
        const T infinity = T(std::numeric_limits<math::scalar_t<T>>::infinity());
        const T errors = squared ? sums.v[1] : sums.v[0];
        const auto finite = (errors < infinity) & (s.target_logit < infinity) & (s.margin < infinity);
        const T divisor = math::select(MarginPolicy::by_count(params), s.powers + T(1e-6), row.num_classes);
        s.per_error = math::select(finite, T(squared ? 2 / unit : 1), nan<T>()) * math::reciprocal(divisor);
        const T value = sums.v[0] * s.per_error * T((squared ? 0.5f : 1.0f) / unit);
        s.value = math::select(has_masked_target(s) & (value > T(0)), infinity, value);
        // The largest number: an error times that is infinite, no error times that is nothing.
        if (squared) s.per_error = math::select(has_masked_target(s) & finite, -lowest<T>(), s.per_error);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T margin, math::mask_t<T> is_target, const T* params, T* kept) {
        *kept = power(s, error(s, z, margin, is_target, params), params);
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T*) {
        return math::select(is_target, -s.powers, *kept) * s.per_error;
    }

    // The largest number stays what it is.
    template <class T>
    FL_HD static void scale(State<T>& s, T by) {
        const T scaled = s.per_error * by;
        s.per_error = math::select(scaled > -lowest<T>(), -lowest<T>(), scaled);
    }

    // Whether an error has the margin of its own class. Else it has that of the target's class.
    FL_HD static bool is_competitors_margin(const double* params) { return MarginPolicy::competitors_margin(params); }

    FL_HD static bool bits_suffice(const double* params) { return !MarginPolicy::is_squared(params); }

    // Whether the error was kept.
    template <class T>
    FL_HD static T bit(const Sums<T, 2>& sums) {
        return sums.v[1];
    }

    template <class T>
    FL_HD static T gradient_of_bit(const State<T>& s, math::mask_t<T> kept, math::mask_t<T> is_target) {
        return math::select(is_target, -s.powers * s.per_error, math::select(kept, s.per_error, T(0) * s.per_error));
    }
};

// params: margin, whether to average over the kept errors only, whether to use the threshold, p.
struct MultiMarginPolicy {
    static constexpr const char* name = "multi_margin";
    static constexpr int num_params = 4;

    template <class T>
    FL_HD static math::mask_t<T> competitors_margin(const T*) {
        return T(0) > T(1);
    }
    template <class T>
    FL_HD static math::mask_t<T> by_count(const T* params) {
        return params[1] > T(0);
    }
    template <class T>
    FL_HD static bool has_threshold(const T* params) {
        return math::to_scalar(params[2]) > math::scalar_t<T>(0);
    }
    template <class T>
    FL_HD static bool is_squared(const T* params) {
        return math::to_scalar(params[3]) > math::scalar_t<T>(1);
    }
};

// params: margin, margin_index (0: the margin of the target's class, 1: of the competing class).
struct HEMPolicy {
    static constexpr const char* name = "hem";
    static constexpr int num_params = 2;

    template <class T>
    FL_HD static math::mask_t<T> competitors_margin(const T* params) {
        return params[1] > T(0);
    }
    template <class T>
    FL_HD static math::mask_t<T> by_count(const T*) {
        return T(1) > T(0);
    }
    template <class T>
    FL_HD static bool has_threshold(const T*) {
        return true;
    }
    template <class T>
    FL_HD static bool is_squared(const T*) {
        return false;
    }
};

// Both in one. params: those of multi_margin, margin_index.
struct AnyMarginPolicy : MultiMarginPolicy {
    template <bool kThreshold, bool kSquared>
    struct Knowing;

    template <class T>
    FL_HD static math::mask_t<T> competitors_margin(const T* params) {
        return params[4] > T(0);
    }
};

template <bool kThreshold, bool kSquared>
struct AnyMarginPolicy::Knowing : AnyMarginPolicy {
    template <class T>
    FL_HD static bool has_threshold(const T*) {
        return kThreshold;
    }
    template <class T>
    FL_HD static bool is_squared(const T*) {
        return kSquared;
    }
};

using MultiMargin = MarginLoss<MultiMarginPolicy>;
using HEM = MarginLoss<HEMPolicy>;

using MarginLosses = TypeList<HEM, MultiMargin>;

}  // namespace FL_ISA
}  // namespace fused_losses
