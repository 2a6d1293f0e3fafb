// The bi-tempered logistic loss (1906.03361): a softmax with heavy tails (t2 > 1) under a bounded logarithm (t1 < 1).
#pragma once

#include "core/multi_reduction_loss.h"
#include "core/pow.h"

namespace fused_losses {
inline namespace FL_ISA {

// params: t1, t2, label smoothing s, num_iters (0: Newton's method, to rounding).
//
// p_j = exp_t2(z_j - lambda) sums to 1. Every power of p is a product of p, a = p^(1-t1) and b = p^(t2-1):
//   L = sum_j y_j (log_t1 y_j - log_t1 p_j) - (y_j^(2-t1) - p_j^(2-t1)) / (2-t1)
//   dL/dz_j = d_j - s_j sum_i d_i,  d_j = (p_j - y_j) p_j^(t2-t1),  s_j = p_j^t2 / sum_i p_i^t2
// The labels are y_y = 1 - s, else s/(K-1).
//
// With n = 1 / (t2 - 1), exp_t2(x) is (1 - x / n)^-n, so where n is a whole number b is a quotient and p a product: no
// log, no exp. The same holds for a where (1 - t1) n is whole. kN is n where the compiler knows it and the root is
// found in some number of iterations, else 0; kDefaults: besides, t1 = 0.8, t2 = 1.2 and s = 0, the defaults.
template <int kN, bool kDefaults = false>
struct BiTemperedOf {
    static constexpr const char* name = "bi_tempered";
    static constexpr int num_params = 4, num_sums = 4;
    static constexpr int num_early_sums = kN > 0 ? 1 : 2;  // two for Newton's method
    static constexpr int num_kept = kDefaults ? 1 : 3;
    static constexpr bool needs_max = true;
    static constexpr int newton_steps = 10;

    template <class T>
    struct State {
        T max, root, lower, upper, ratio, value;  // lambda = max + root; see refine_root for the others
    };

    // Calls body.operator()<Loss>() with the loss that knows the n of common temperatures. Those come as floats: for
    // doubles 1 / (1.2f - 1) is no whole number.
    template <class Body>
    static void visit_variant(const double* params, Body body) {
        const float of_log = 1 - static_cast<float>(params[0]), of_exp = static_cast<float>(params[1]) - 1;
        switch (params[3] > 0 ? whole(1 / of_exp) : 0) {
            case 2: return body.template operator()<BiTemperedOf<2>>();
            case 5:
                if (whole(5 * of_log) == 1 && params[2] == 0) return body.template operator()<BiTemperedOf<5, true>>();
                return body.template operator()<BiTemperedOf<5>>();
            default: return body.template operator()<BiTemperedOf<0>>();
        }
    }

    enum class Method { kExact, kNewton, kFixedPoint, kBisection };

    template <class S>
    FL_HD static Method method(S t2, S num_iters) {
        if (kN > 0) return Method::kFixedPoint;
        if (t2 == S(1)) return Method::kExact;
        if (num_iters == S(0)) return Method::kNewton;
        return t2 > S(1) ? Method::kFixedPoint : Method::kBisection;
    }

    // The last pass is for the loss, those before find the root. The fixed point sums once more after its last step,
    // the bisection counts the classes in play first.
    template <class S>
    FL_HD static int root_passes(S t2, S num_iters) {
        switch (method(t2, num_iters)) {
            case Method::kExact: return 1;
            case Method::kNewton: return newton_steps;
            default: return static_cast<int>(num_iters) + 1;
        }
    }

    template <class T>
    FL_HD static int passes(const T* params) {
        return root_passes(math::to_scalar(params[1]), math::to_scalar(params[3])) + 1;
    }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        // An infinite maximum spoils the whole row, as NaN does by itself. The fixed point starts with a scale of 1.
        return {row.max + T(0) * row.max, T(0), T(1), T(0), T(0), T(0)};
    }

    // 1 - t1 and t2 - 1 as numbers and in units of 1/n (0 where they are no whole number of them). Float temperatures
    // are off by their rounding, of which p takes the n-th power: whole numbers tell the exact ones.
    template <class T>
    struct Excess {
        T of_log, of_exp;
        int n, n_of_log;
    };

    template <class S>
    FL_HD static int nearest(S x) {
        return static_cast<int>(x + S(0.5));
    }

    // x if it is a whole number in [1, 16) but for rounding, else 0.
    template <class S>
    FL_HD static int whole(S x) {
        if (!(x > S(0.5) && x < S(16))) return 0;
        const S off = x - S(nearest(x)), tolerance = S(16) * x * std::numeric_limits<S>::epsilon();
        return off * off <= tolerance * tolerance ? nearest(x) : 0;
    }

    template <class T>
    FL_HD static Excess<T> excess(const T* params) {
        using S = math::scalar_t<T>;
        const S of_log = S(1) - math::to_scalar(params[0]), of_exp = math::to_scalar(params[1]) - S(1);
        const int n = kN > 0 ? kN : whole(S(1) / of_exp), n_of_log = kDefaults ? 1 : whole(S(n) * of_log);
        return {n_of_log > 0 ? T(S(n_of_log) / S(n)) : T(of_log), n > 0 ? T(S(1) / S(n)) : T(of_exp), n, n_of_log};
    }

    // log exp_t(x), exp_t(x) = [1 - excess x]_+^(-1/excess), excess = t - 1; -inf where exp_t is 0
    template <class T>
    FL_HD static T log_exp(T x, T excess) {
        if (math::to_scalar(excess) == math::scalar_t<T>(0)) return x;
        const T inside = -excess * x;
        return math::log1p(math::select(inside < T(-1), T(-1), inside)) / -excess;
    }

    // log_t, excess = 1 - t
    template <class T>
    FL_HD static T log_t(T log_x, T excess) {
        if (math::to_scalar(excess) == math::scalar_t<T>(0)) return log_x;
        return math::divide(math::expm1(excess * log_x), excess);
    }

    // b = exp_t2(x)^(t2-1) for whole n, x <= 0: 0 at -inf.
    template <class T>
    FL_HD static T quotient(T x, T of_exp) {
        return math::reciprocal_or_zero(T(1) - of_exp * x);
    }

    // exp_t2(scale x)
    template <class T>
    FL_HD static T probability(T x, T scale, const T* params) {
        const Excess<T> t = excess(params);
        if (t.n > 0) return math::integer_power(quotient(x, scale * t.of_exp), t.n);
        return math::exp(log_exp(scale * x, t.of_exp));
    }

    template <class T>
    struct Powers {
        T p, a, b;
    };

    // A class of probability 0 takes no part: all three are 0.
    template <class T>
    FL_HD static Powers<T> powers(T x, const T* params) {
        using S = math::scalar_t<T>;
        const Excess<T> t = excess(params);
        if (t.n > 0) {
            const T b = quotient(x, t.of_exp);
            const T a = t.n_of_log > 0 ? math::integer_power(b, t.n_of_log) : math::pow(b, t.of_log * T(S(t.n)));
            return {math::integer_power(b, t.n), a, b};
        }
        const T log_p = log_exp(x, t.of_exp);
        const auto absent = log_p == T(-std::numeric_limits<S>::infinity());
        const auto unless_absent = [&](T power) { return math::select(absent, T(0), power); };
        return {math::exp(log_p), unless_absent(math::exp(t.of_log * log_p)),
                unless_absent(math::exp(t.of_exp * log_p))};
    }

    // The powers of which the gradient consists, and what is kept of them by the last pass: with default parameters b,
    // of which the others are quickly made.
    template <class T>
    FL_HD static void keep_powers(const Powers<T>& of, T* kept) {
        kept[0] = of.b;
        if constexpr (!kDefaults) kept[1] = of.a, kept[2] = of.p;
    }

    template <class T>
    FL_HD static Powers<T> powers_of_kept(const T* kept) {
        if constexpr (kDefaults)
            return {math::integer_power(kept[0], kN), kept[0], kept[0]};
        else
            return {kept[2], kept[1], kept[0]};
    }

    template <bool last, class T>
    FL_HD static Sums<T, 4> map(int pass, const State<T>& s, T z, T, math::mask_t<T> is_target, const T* params,
                                T* kept) {
        const T x = z - s.max, none = T(0);
        if constexpr (last) {
            const Powers<T> of = powers(x - s.root, params);
            if (kept) keep_powers(of, kept);
            Sums<T, 4> sums{{of.p * of.a, of.p * of.b, (of.p - label(s, is_target, params)) * (of.a * of.b), none}};
            if (kDefaults || math::to_scalar(params[2]) == math::scalar_t<T>(0)) return sums;
            const Excess<T> t = excess(params);
            sums.v[3] = math::select(is_target, none, log_t(log_exp(x - s.root, t.of_exp), t.of_log));
            return sums;
        }
        const auto t2 = math::to_scalar(params[1]), num_iters = math::to_scalar(params[3]);
        switch (method(t2, num_iters)) {
            case Method::kExact: return {{math::exp(x), none, none, none}};
            case Method::kNewton: {
                const Powers<T> of = powers(x - s.root, params);
                return {{of.p, of.p * of.b, none, none}};
            }
            case Method::kFixedPoint: return {{probability(x, s.lower, params), none, none, none}};
            default: break;
        }
        if (pass == 0) return {{math::select(x > T(-1) / (T(1) - params[1]), T(1), T(0)), none, none, none}};
        const T middle = (s.lower + s.upper) * T(0.5);
        return {{probability(x - middle, T(1), params), none, none, none}};
    }

    // A step of the fixed point adds up (1 - scale x / n)^-n. Beyond the limit that is below 2^-55, beside a sum of at
    // least 1; it keeps -inf away.
    template <class T>
        requires(kN > 0)
    FL_HD static T early_input(const State<T>& s, T z) {
        using S = math::scalar_t<T>;
        constexpr S limit = -S(kN) * S(std::uint32_t(1) << 55 / (kN > 0 ? kN : 1));
        const T x = z - s.max;
        return math::select(T(limit) > x, T(limit), x);  // NaN stays
    }

    template <class T>
    FL_HD static T denominator(const State<T>& s, T x, const T* params) {
        return math::integer_power(T(1) - s.lower * excess(params).of_exp * x, kN);
    }

    template <class T>
    FL_HD static void finalize(int pass, State<T>& s, const Sums<T, 4>& sums, const RowInputs<T>& row,
                               const T* params) {
        const auto t2 = math::to_scalar(params[1]), num_iters = math::to_scalar(params[3]);
        const int last = root_passes(t2, num_iters);
        if (pass == last) return finish(s, sums, row, params);
        const bool is_found = pass == last - 1;
        refine_root(pass, s, sums, method(t2, num_iters), excess(params).of_exp, is_found);
        if (is_found && !kDefaults) s.lower = spread(row, params);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        keep_powers(powers((z - s.max) - s.root, params), kept);
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T* params) {
        const Powers<T> of = powers_of_kept(kept);
        return of.b * ((of.p - label(s, is_target, params)) * of.a - of.p * s.ratio);
    }

private:
    // What label smoothing gives to each other class.
    template <class T>
    FL_HD static T spread(const RowInputs<T>& row, const T* params) {
        const T others = row.num_classes - T(1);
        return math::select(others > T(0), params[2] / others, T(0));
    }

    // Once the root is found.
    template <class T>
    FL_HD static T label(const State<T>& s, math::mask_t<T> is_target, const T* params) {
        return kDefaults ? math::select(is_target, T(1), T(0)) : math::select(is_target, T(1) - params[2], s.lower);
    }

    // `lower` and `upper` bracket the root for the bisection. For the fixed point, which scales x, `lower` is the
    // scale, and the root waits for the last step. In the end `lower` is what finalize puts there.
    template <class T>
    FL_HD static void refine_root(int pass, State<T>& s, const Sums<T, 4>& sums, Method method, T of_exp, bool last) {
        const T sum = sums.v[0];
        if (method == Method::kFixedPoint && !last) {
            // Steps to come make the error smaller, by much where t2 is at most 1.5.
            s.lower = kN > 0 ? math::coarse_pow(sum, -of_exp) : math::exp(-of_exp * math::log(sum));
            return;
        }
        const T log_sum = math::log(sum);
        switch (method) {
            case Method::kExact: s.root = log_sum; return;
            // Newton on log_t2(sum exp_t2(x - root)) = 0 from the left of the root: never overshoots.
            case Method::kNewton:
                s.root += sum * math::exp(of_exp * log_sum) * log_t(log_sum, -of_exp) / sums.v[1];
                return;
            case Method::kFixedPoint: s.root = log_t(log_sum, of_exp); return;
            case Method::kBisection: break;
        }
        const T middle = (s.lower + s.upper) * T(0.5);
        const auto below = sum < T(1);
        s.upper = pass == 0 ? log_t(log_sum, of_exp) : math::select(below, middle, s.upper);
        s.lower = pass == 0 ? T(0) : math::select(below, s.lower, middle);
        s.root = (s.lower + s.upper) * T(0.5);
    }

    template <class T>
    FL_HD static void finish(State<T>& s, const Sums<T, 4>& sums, const RowInputs<T>& row, const T* params) {
        const Excess<T> t = excess(params);
        const T power = T(1) + t.of_log, x = (row.target_logit - s.max) - s.root;
        s.ratio = math::divide(sums.v[2], sums.v[1]);
        if constexpr (kDefaults) {  // labels 1 and 0; log_t1 p = (b - 1) / of_log = x b
            const T b = quotient(x, t.of_exp), log_t_p = math::select(b == T(0), T(-1) / t.of_log, x * b);
            s.value = (sums.v[0] - T(1)) * (T(1) / power) - log_t_p;
            return;
        }
        const T log_t_p = log_t(log_exp(x, t.of_exp), t.of_log);
        const T own = T(1) - params[2], other = s.lower, others = row.num_classes - T(1);
        const T of_own = math::zero_at_zero(own, log_t_p);         // a label of 0 hides an infinite logarithm
        const T of_others = math::zero_at_zero(other, sums.v[3]);  // without the target's
        const T of_labels = entropy(own, t.of_log) + others * entropy(other, t.of_log);
        s.value = of_labels + sums.v[0] / power - of_own - of_others;
    }

    // y log_t y - y^(2-t) / (2-t), 0 at y = 0; excess = 1 - t
    template <class T>
    FL_HD static T entropy(T y, T excess) {
        const T log_y = math::log(y), power = T(1) + excess;
        return math::select(y > T(0), y * log_t(log_y, excess) - math::exp(power * log_y) / power, T(0));
    }
};

// Any temperatures.
using BiTempered = BiTemperedOf<0>;

}  // namespace FL_ISA
}  // namespace fused_losses
