// The bi-tempered logistic loss (1906.03361): a softmax with heavy tails (t2 > 1) under a bounded logarithm (t1 < 1).
#pragma once

#include "core/pass_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

// params: t1, t2, label smoothing s, num_iters (0: Newton's method, to rounding).
//
// p_j = exp_t2(z_j - lambda) sums to 1. Every power of p goes through log p. The labels are y_y = 1 - s, else s/(K-1):
//   L = sum_j y_j (log_t1 y_j - log_t1 p_j) - (y_j^(2-t1) - p_j^(2-t1)) / (2-t1)
//   dL/dz_j = d_j - s_j sum_i d_i,  d_j = (p_j - y_j) p_j^(t2-t1),  s_j = p_j^t2 / sum_i p_i^t2
struct BiTempered {
    static constexpr const char* name = "bi_tempered";
    static constexpr int num_params = 4, num_sums = 5, num_kept = 3;
    static constexpr bool needs_max = true;
    static constexpr int newton_steps = 10;

    template <class T>
    struct State {
        T max, root, lower, upper, ratio, value;  // lambda = max + root; the fixed point keeps its scale in `lower`
    };

    enum class Method { kExact, kNewton, kFixedPoint, kBisection };

    template <class S>
    FL_HD static Method method(S t2, S num_iters) {
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

    FL_HD static int passes(const double* params) { return root_passes(params[1], params[3]) + 1; }
    FL_HD static bool keeps(int pass, int passes) { return pass == passes - 1; }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        // An infinite maximum spoils the whole row, as NaN does by itself.
        return {row.max + T(0) * row.max, T(0), T(0), T(0), T(0), T(0)};
    }

    // log exp_t(x), exp_t(x) = [1 + (1-t) x]_+^(1/(1-t)); -inf where exp_t is 0
    template <class T>
    FL_HD static T log_exp(T x, T t) {
        if (math::to_scalar(t) == math::scalar_t<T>(1)) return x;
        const T inside = (T(1) - t) * x;
        return math::log1p(math::select(inside < T(-1), T(-1), inside)) / (T(1) - t);
    }

    // p^exponent; a class of probability 0 takes no part, whatever the exponent.
    template <class T>
    FL_HD static T power(T log_p, T exponent) {
        const T infinity = T(std::numeric_limits<math::scalar_t<T>>::infinity());
        return math::select(log_p == -infinity, T(0), math::exp(exponent * log_p));
    }

    template <class T>
    FL_HD static T log_t(T log_x, T t) {
        if (math::to_scalar(t) == math::scalar_t<T>(1)) return log_x;
        return math::expm1((T(1) - t) * log_x) / (T(1) - t);
    }

    // p = exp_t2(x), x <= 0, as something to take powers of. With n = 1 / (t2 - 1) it is (1 - x / n)^-n, so where n and
    // n t1 are whole numbers, as for the defaults, all powers that occur are products: no log, no exp.
    template <class T>
    struct Power {
        T x;  // 1 / (1 - x / n) if n > 0, else log p
        int n;

        FL_HD T operator()(T exponent) const {
            if (n == 0) return power(x, exponent);
            return math::integer_power(x, nearest(math::scalar_t<T>(n) * math::to_scalar(exponent)));
        }
    };

    template <class S>
    FL_HD static int nearest(S x) {
        return static_cast<int>(x + S(0.5));
    }

    // n as above, 0 where it does not apply. Float t1 and t2 are off by their rounding.
    template <class S>
    FL_HD static int whole(S t1, S t2) {
        const S n = S(1) / (t2 - S(1));
        if (!(n > S(0.5) && n < S(16))) return 0;
        const S of_n = n - S(nearest(n)), of_t1 = n * t1 - S(nearest(n * t1)), tolerance = S(1e-4);
        return of_n * of_n + of_t1 * of_t1 < tolerance * tolerance ? nearest(n) : 0;
    }

    template <class T>
    FL_HD static Power<T> probability(T x, const T* params) {
        const T t2 = params[1];
        const int n = whole(math::to_scalar(params[0]), math::to_scalar(t2));
        if (n == 0) return {log_exp(x, t2), 0};
        const T inside = T(1) + (T(1) - t2) * x;
        return {math::select(inside > T(1e30), T(0), math::reciprocal(inside)), n};  // 0 at -inf
    }

    template <class T>
    FL_HD static Sums<T, 5> term(int pass, const State<T>& s, T z, T margin, math::mask_t<T> is_target,
                                 const T* params) {
        T kept[num_kept];
        return term_keeping(pass, s, z, margin, is_target, params, kept);
    }

    // Kept by the last pass: the powers of which the gradient consists.
    template <class T>
    FL_HD static Sums<T, 5> term_keeping(int pass, const State<T>& s, T z, T, math::mask_t<T>, const T* params,
                                         T* kept) {
        const T t1 = params[0], t2 = params[1], x = z - s.max, none = T(0);
        const auto scalar_t2 = math::to_scalar(t2), num_iters = math::to_scalar(params[3]);
        if (pass == root_passes(scalar_t2, num_iters)) {
            const Power<T> p = probability(x - s.root, params);
            keep(p, t1, t2, kept);
            Sums<T, 5> sums{{p(T(2) - t1), kept[1], kept[0], none, none}};
            if (math::to_scalar(params[2]) == math::scalar_t<T>(0)) return sums;
            sums.v[3] = kept[2];
            sums.v[4] = log_t(log_exp(x - s.root, t2), t1);
            return sums;
        }
        switch (method(scalar_t2, num_iters)) {
            case Method::kExact: return {{math::exp(x), none, none, none, none}};
            case Method::kNewton: {
                const Power<T> p = probability(x - s.root, params);
                return {{p(T(1)), p(t2), none, none, none}};
            }
            case Method::kFixedPoint:
                return {{probability(pass == 0 ? x : x * s.lower, params)(T(1)), none, none, none, none}};
            default: break;
        }
        if (pass == 0) return {{math::select(x > T(-1) / (T(1) - t2), T(1), T(0)), none, none, none, none}};
        const T middle = (s.lower + s.upper) * T(0.5);
        return {{probability(x - middle, params)(T(1)), none, none, none, none}};
    }

    template <class T>
    FL_HD static void keep(const Power<T>& p, T t1, T t2, T* kept) {
        kept[0] = p(T(1) + t2 - t1);
        kept[1] = p(t2);
        kept[2] = p(t2 - t1);
    }

    template <class T>
    FL_HD static void end_pass(int pass, State<T>& s, const Sums<T, 5>& sums, const RowInputs<T>& row,
                               const T* params) {
        const auto t2 = math::to_scalar(params[1]), num_iters = math::to_scalar(params[3]);
        const int last = root_passes(t2, num_iters);
        if (pass == last) return finish(s, sums, row, params);
        refine_root(pass == last - 1, pass, s, sums, method(t2, num_iters), params[1]);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, T z, T, math::mask_t<T> is_target, const T* params) {
        T kept[num_kept];
        keep(probability((z - s.max) - s.root, params), params[0], params[1], kept);
        return gradient_of_kept(s, kept, is_target, params);
    }

    template <class T>
    FL_HD static T gradient_of_kept(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T* params) {
        const T label = math::select(is_target, T(1) - params[2], s.lower);  // finish has put s/(K-1) there
        return (kept[0] - share(label, kept[2])) - kept[1] * s.ratio;
    }

private:
    // label * x, where a label of 0 hides an infinite x
    template <class T>
    FL_HD static T share(T label, T x) {
        return math::select(label == T(0), T(0), label * x);
    }

    template <class T>
    FL_HD static void refine_root(bool final, int pass, State<T>& s, const Sums<T, 5>& sums, Method method, T t2) {
        const T sum = sums.v[0], log_sum = math::log(sum);
        switch (method) {
            case Method::kExact: s.root = log_sum; return;
            // Newton on log_t2(sum exp_t2(x - root)) = 0 from the left of the root: never overshoots.
            case Method::kNewton: s.root += math::exp(t2 * log_sum) * log_t(log_sum, t2) / sums.v[1]; return;
            case Method::kFixedPoint:
                s.lower = math::exp((T(1) - t2) * log_sum);
                if (final) s.root = -log_t(-log_sum, t2);
                return;
            case Method::kBisection: break;
        }
        const T middle = (s.lower + s.upper) * T(0.5);
        const auto below = sum < T(1);
        s.upper = pass == 0 ? -log_t(-log_sum, t2) : math::select(below, middle, s.upper);
        s.lower = pass == 0 ? T(0) : math::select(below, s.lower, middle);
        s.root = (s.lower + s.upper) * T(0.5);
    }

    template <class T>
    FL_HD static void finish(State<T>& s, const Sums<T, 5>& sums, const RowInputs<T>& row, const T* params) {
        const T t1 = params[0], t2 = params[1], smoothing = params[2];
        const T own = T(1) - smoothing, others = row.num_classes - T(1);
        const T spread = math::select(others > T(0), smoothing / others, T(0));
        const T log_p = log_exp((row.target_logit - s.max) - s.root, t2), log_t_p = log_t(log_p, t1);
        const T of_target = share(own - spread, power(log_p, t2 - t1));
        s.ratio = (sums.v[2] - spread * sums.v[3] - of_target) / sums.v[1];
        const T exponent = T(2) - t1;
        const T of_labels = entropy(own, t1) + others * entropy(spread, t1);
        const T of_others = math::select(spread == T(0), T(0), spread * (sums.v[4] - log_t_p));
        s.value = of_labels + sums.v[0] / exponent - share(own, log_t_p) - of_others;
        s.lower = spread;
    }

    // y log_t y - y^(2-t) / (2-t), 0 at y = 0
    template <class T>
    FL_HD static T entropy(T y, T t) {
        const T log_y = math::log(y);
        return math::select(y > T(0), y * log_t(log_y, t) - math::exp((T(2) - t) * log_y) / (T(2) - t), T(0));
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
