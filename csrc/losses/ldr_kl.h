// The label-distributionally robust loss with a KL divergence (2112.14869): cross entropy's log-sum-exp over scores
// that are positive, of mean 1 and bounded, so that no row is worth more than num_classes.
#pragma once

#include "core/multi_reduction_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// params: temperature, margin c. With s_j = log(1 + e^z_j), h_j = s_j / mean s, and L the temperature,
//   value = L log mean_j exp((h_j - h_y + c [j != y]) / L)
//   dv/dh_j = g_j = q_j - [j = y], q the softmax of (h_j + c [j != y]) / L
//   dv/dz_j = sigmoid(z_j) / mean s * (g_j - mean_k g_k h_k)
//
// Scores are t_j = s_j unit, of which no sum overflows; unit is a power of two, so that a fused multiply-add changes
// nothing. Where all logits are below tiny(), s_j is e^z_j, and only differences of logits matter. The exponents are
// taken relative to the largest score and half a margin: with c at most 100 L (a rule of the parameters) their sum
// neither overflows nor vanishes, whichever class has the largest score.
//
// kCool: the temperature is at most 2. kCoarse: as in PowerLoss.
template <bool kCool, bool kCoarse = false>
struct LDRKLOf {
    using Usual = LDRKLOf<true>;
    using Coarse = LDRKLOf<kCool, true>;

    static constexpr const char* name = "ldr_kl";
    static constexpr int num_params = 2, num_sums = 3, num_early_sums = 1, num_kept = 2;
    static constexpr bool needs_max = true;
    static constexpr float unit = 1.0f / (std::int64_t(1) << 48);

    template <class T>
    FL_HD static T tiny() {
        return T(sizeof(math::scalar_t<T>) == 4 ? -20 : -40);
    }

    template <class T>
    struct State {
        T shift;      // the largest logit where that is below tiny(), else 0
        T top;        // t of the largest logit
        T scale;      // 1 / (L mean t)
        T of_target;  // t_y; in the end g_y
        T per_term;   // q_j / its exponential
        T mean;       // mean_k g_k h_k
        T value;
    };

    // Of a class: t, and sigmoid(z); both times e^-shift.
    template <class T>
    struct Score {
        T t, slope;
    };

    template <class T>
    FL_HD static Score<T> score(T z, T shift) {
        const T x = z - shift, e = math::exp_not_positive<kCoarse>(math::minus_abs(x));
        const auto positive = x > T(0);
        const T damped = math::select(shift < T(0), T(0), T(1)) * e;  // log(1 + 0 e) / 0 is 1
        return {(math::select(positive, x, T(0)) + e * math::log1p_over(damped)) * T(unit),
                math::select(positive, T(1), e) * math::reciprocal(T(1) + damped)};
    }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        State<T> s{};
        s.shift = math::select(row.max < tiny<T>(), row.max, T(0));
        s.top = score(row.max, s.shift).t;
        s.of_target = score(row.target_logit, s.shift).t;
        return s;
    }

    // Relative to the largest class and half a margin, at most 50; what it adds is -that for the target.
    template <class T>
    FL_HD static T exponent(const State<T>& s, T t, T half_margin) {
        return (t - s.top) * s.scale + half_margin;
    }
    template <class T>
    FL_HD static T half_margin(const T* params) {
        return T(0.5) * params[1] * math::reciprocal(params[0]);
    }

    // At high temperatures all exponentials are near 1.
    template <class T>
    FL_HD static bool is_hot(const T* params) {
        return !kCool && math::to_scalar(params[0]) > math::scalar_t<T>(2);
    }

    template <class Body>
    static void visit_usual(const double* params, Body body) {
        if (!is_hot(params)) body.template operator()<Usual>();
    }

    // Kept: t, in the end its exponential; the slope of s.
    template <bool last, class T>
    FL_HD static Sums<T, 3> map(int, const State<T>& s, T z, T, math::mask_t<T> is_target, const T* params, T* kept) {
        if (!last) {
            const Score<T> of = score(z, s.shift);
            if (kept) kept[0] = of.t, kept[1] = of.slope;
            return {{of.t, T(0), T(0)}};
        }
        const T t = kept ? kept[0] : score(z, s.shift).t;
        const T x = exponent(s, t, half_margin(params));  // which does not overflow
        const T w = math::exp_not_positive<kCoarse>(x);
        const T of_other = math::select(is_target, T(0), w);
        if (kept) kept[0] = w;
        // What the exponentials are beyond 1, for the target 0, or -1 where that is one operation less.
        const T beyond = is_hot(params) ? math::select(is_target, T(0), math::expm1_of(x, w)) : of_other - T(1);
        return {{of_other, of_other * (t - s.of_target), beyond}};
    }

    template <class T>
    FL_HD static void finalize(int pass, State<T>& s, const Sums<T, 3>& sums, const RowInputs<T>& row,
                               const T* params) {
        const T temperature = params[0];
        if (pass == 0) {
            s.scale = row.num_classes / (temperature * sums.v[0]);
            return;
        }
        const T x = exponent(s, s.of_target, -half_margin(params)), own = math::exp_not_positive<kCoarse>(x);
        const T sum = sums.v[0] + own;
        const T mean_beyond_one = (sums.v[2] + (is_hot(params) ? math::expm1_of(x, own) : own)) / row.num_classes;
        const T below_top = (s.top - s.of_target) * (s.scale * temperature);
        s.value =
            temperature * math::log_near_one(sum / row.num_classes, mean_beyond_one) + (below_top + T(0.5) * params[1]);
        s.per_term = T(1) / sum;
        s.mean = sums.v[1] * s.per_term * (s.scale * temperature / row.num_classes);
        s.of_target = -sums.v[0] * s.per_term;
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const Score<T> of = score(z, s.shift);
        kept[0] = math::exp_not_positive<kCoarse>(exponent(s, of.t, half_margin(params)));
        kept[1] = of.slope;
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T* params) {
        const T g = math::select(is_target, s.of_target, kept[0] * s.per_term);
        return (kept[1] * (T(unit) * s.scale * params[0])) * (g - s.mean);
    }
};

// At any temperature.
using LDRKL = LDRKLOf<false>;

}  // namespace FL_ISA
}  // namespace fused_losses
