// Losses of a sum of powers of the probabilities: with f_j = e^(q (z_j - max)), p_j^q is f_j e^(-q lse), so that one
// pass over the exponentials suffices.
#pragma once

#include "core/multi_reduction_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// What a row's sums are, and its target's power.
template <class T>
struct PowerRow {
    T log_p, power;        // p_y^q
    T sum, sum_of_misses;  // of p_j^q and of 1 - p_j^q
    T num_classes;
};

// Rule gives the exponent, and the loss as an AffineRow with u_j = p_j^q. kOrdinary: q is not so small that 1 - f would
// lose its digits in all classes.
// kCoarse: logits and gradient are numbers of 16 bits.
template <class Rule, bool kOrdinary = false, bool kCoarse = false>
struct PowerLoss {
    using Coarse = PowerLoss<Rule, kOrdinary, true>;

    static constexpr const char* name = Rule::name;
    static constexpr int num_params = Rule::num_params, min_classes = Rule::min_classes;
    static constexpr int num_sums = 3, num_early_sums = 0, num_kept = 2;
    static constexpr bool needs_max = true;

    template <class T>
    struct State {
        T max, value, alpha, gamma, target_grad;  // alpha of exp(z - max), gamma of f
    };

    template <class Body>
    static void visit_variant(const double* params, Body body) {
        Rule::exponent(params) < 1e-3 ? body.template operator()<PowerLoss<Rule, false>>()
                                      : body.template operator()<PowerLoss<Rule, true>>();
    }

    template <class T>
    FL_HD static int passes(const T*) {
        return 1;
    }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        return {row.max, T(0), T(0), T(0), T(0)};
    }

    // Kept: exp(z - max), f.
    template <bool last, class T>
    FL_HD static Sums<T, 3> map(int, const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T x = z - s.max, q = Rule::exponent(params);
        const T e = math::exp_not_positive<kCoarse>(x), f = math::exp_not_positive<kCoarse>(q * x);
        if (kept) kept[0] = e, kept[1] = f;
        // Where all f are near 1, the sum of 1 - f is not K - sum f.
        return {{e, f, kOrdinary ? T(1) - f : -math::expm1_of(q * x, f)}};
    }

    template <class T>
    FL_HD static void finalize(int, State<T>& s, const Sums<T, 3>& sums, const RowInputs<T>& row, const T* params) {
        const T q = Rule::exponent(params), log_sum = math::log_of_sum<kCoarse>(sums.v[0]);
        const T shift = -q * log_sum, scale = math::exp_not_positive(shift);
        const T log_p = (row.target_logit - s.max) - log_sum;
        // 1 - p^q = (1 - e^shift) + e^shift (1 - f)
        const T misses = scale * sums.v[2] - row.num_classes * math::expm1_of(shift, scale);
        const PowerRow<T> of{log_p, math::exp_not_positive(q * log_p), scale * sums.v[1], misses, row.num_classes};
        const AffineRow<T> affine = Rule::eval(of, params);
        s.value = affine.value;
        s.alpha = affine.alpha * math::reciprocal(sums.v[0]);
        s.gamma = affine.gamma * scale;
        s.target_grad = target_gradient(affine, log_p, of.power);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T x = z - s.max;
        kept[0] = math::exp_not_positive<kCoarse>(x);
        kept[1] = math::exp_not_positive<kCoarse>(Rule::exponent(params) * x);
    }

    template <class T>
    FL_HD static void scale(State<T>& s, T by) {
        s.alpha *= by;
        s.gamma *= by;
        s.target_grad *= by;
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T*) {
        return math::select(is_target, s.target_grad, s.alpha * kept[0] + s.gamma * kept[1]);
    }
};

// params: q. (1 - p_y^q) / sum_j (1 - p_j^q): n_j = 1 - p_j^q, W_j = q p_j^q.
struct NGCERule {
    static constexpr const char* name = "ngce";
    static constexpr int num_params = 1, min_classes = 2;

    template <class T>
    FL_HD static T exponent(const T* params) {
        return params[0];
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const PowerRow<T>& row, const T* params) {
        const T q = params[0];
        const NormalizedTerm<T> of_target{-math::expm1_of(q * row.log_p, row.power), q * row.power};
        AffineRow<T> affine = normalized(of_target, row.sum_of_misses, q * row.sum);
        affine.gamma *= q;
        return affine;
    }
};

// params: q. (mean_j p_j^q - p_y^q) / q; for small q, where all powers are near 1, by what they miss.
struct SGCERule {
    static constexpr const char* name = "sgce";
    static constexpr int num_params = 1, min_classes = 1;

    template <class T>
    FL_HD static T exponent(const T* params) {
        return params[0];
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const PowerRow<T>& row, const T* params) {
        const T q = params[0], miss = -math::expm1_of(q * row.log_p, row.power), of_one = T(1) / row.num_classes;
        const T difference = math::select(q < T(0.1), miss - row.sum_of_misses * of_one, row.sum * of_one - row.power);
        return {difference / q, row.power - row.sum * of_one, -row.power, of_one};
    }
};

// params: a. mean_j (a [j = y] - p_j)^2.
struct AMSERule {
    static constexpr const char* name = "amse";
    static constexpr int num_params = 1, min_classes = 1;

    template <class T>
    FL_HD static T exponent(const T*) {
        return T(2);
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const PowerRow<T>& row, const T* params) {
        return of_squares(row.log_p, row.power, row.sum, row.num_classes, params[0]);
    }

    // From p_y^2 and sum p_j^2. The target's term by itself: with a = 1 it is the square of what p_y misses.
    template <class T>
    FL_HD static AffineRow<T> of_squares(T log_p, T square, T sum, T num_classes, T a) {
        const math::Exponentials<T> p(log_p);
        const T of_class = math::divide(T(1), num_classes), two = T(2) * of_class;
        const T a_p = a * p.value, rest = (a - T(1)) - p.minus_1;
        return {(rest * rest + (sum - square)) * of_class, two * (a_p - sum), -two * a_p, two};
    }
};

// All in one. params: q, which rule (0: ngce, 1: sgce, 2: amse, with q = 2), a.
struct AnyPowerRule {
    static constexpr const char* name = "any_power";
    static constexpr int num_params = 3, min_classes = 1;

    template <class T>
    FL_HD static T exponent(const T* params) {
        return params[0];
    }

    template <class T>
    FL_HD static AffineRow<T> eval(const PowerRow<T>& row, const T* params) {
        const int rule = static_cast<int>(math::to_scalar(params[1]));
        return rule == 0 ? NGCERule::eval(row, params)
                         : (rule == 1 ? SGCERule::eval(row, params) : AMSERule::eval(row, params + 2));
    }
};

using NGCE = PowerLoss<NGCERule>;
using SGCE = PowerLoss<SGCERule>;
using AMSE = PowerLoss<AMSERule>;

using PowerLosses = TypeList<NGCE, SGCE, AMSE>;

}  // namespace FL_ISA
}  // namespace fused_losses
