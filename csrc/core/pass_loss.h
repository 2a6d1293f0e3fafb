// The contract of a loss that needs more of its row than the softmax sums: a few passes over the logits, each adding up
// some numbers per class, with a state per row in between. T is a float, a double, or a vector of them: on the CPU its
// elements are rows, or all the same where the vector runs over classes.
//
//     static constexpr const char* name;
//     static constexpr int num_params, num_sums;
//     static constexpr bool needs_max;         whether RowInputs::max is to be found first
//     what it asks of its arguments (losses/needs.h), where that is not the default
//     template <class T> struct State;         numbers per row, floating point only; saved for backward as they are
//     FL_HD static int passes(const double* params)
//     begin(row, params) -> State
//     term(pass, state, z, margin, is_target, params) -> Sums          what one class adds
//     end_pass(pass, state, sums, row, params)                         sums over all classes
//     value(state) -> T
//     gradient(state, z, margin, is_target, params) -> T               dL/dz of one class
//
// Where the pass is known to be the last or not while compiling, and there may be room for some numbers per class, so
// that passes need not start from the logits again:
//
//     static constexpr int num_early_sums;             passes but the last add to the first so many sums only
//     static constexpr int num_kept;                   how many numbers per class
//     term_keeping<last>(pass, state, z, margin, is_target, params, T* kept)    as term; without room kept is null
//     gradient_of_kept(state, kept, is_target, params) -> T                     after all passes
//
// Where the passes but the last add up reciprocals, of which two can share a division:
//
//     early_input(state, z) -> T                       what they need of a logit; the same in all of them
//     denominator(state, input, params) -> T           what each adds the reciprocal of, at least 1 and below 2^60
//
// Where state and a bit per class say all about the gradient, so that it can be written without the logits:
//
//     bits_suffice(const double* params)               whether they do
//     bit(sums) -> T                                   from what the class has added in the last pass; 0 is no
//     gradient_of_bit(state, bit, is_target) -> T
#pragma once

#include "core/math.h"
#include "core/softmax_loss.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class T>
struct RowInputs {
    T max;           // of the logits, NaN skipped
    T target_logit;  // logit bias added
    T margin;        // of the target's class
    T num_classes;
};

template <class T, int n>
struct Sums {
    T v[n];
};

constexpr int kMaxState = 6;

template <class Loss>
constexpr bool kHasBits =
    requires(typename Loss::template State<float> state) { Loss::gradient_of_bit(state, true, true); };

template <class Loss>
constexpr bool kAddsReciprocals =
    requires(typename Loss::template State<float> state) { Loss::early_input(state, 0.0f); };

template <class State, class T>
constexpr int kStateSize = sizeof(State) / sizeof(T);

// ---- Losses n_y / sum_j n_j with n_j a function of log p_j ---------------------------------------------------------

// n_j and W_j = -dn_j / dlog p_j
template <class T>
struct Share {
    T n, w;
};

// From D = sum n_j: L = n_y / D, dL/dz_j = (W_y (p_j - [j = y]) - L (p_j sum W - W_j)) / D: affine in p with u_j = W_j.
template <class T>
FL_HD AffineRow<T> normalized(const Share<T>& own, T sum_n, T sum_w) {
    const T value = own.n / sum_n;
    return {value, (own.w - value * sum_w) / sum_n, -own.w / sum_n, value / sum_n};
}

// Adapts a loss with `share(log_p, p, params) -> Share` and `eval(log_p, sum_n, sum_w, params) -> AffineRow`.
template <class Loss>
struct OfShares {
    static constexpr const char* name = Loss::name;
    static constexpr int num_params = Loss::num_params, min_classes = 2;
    static constexpr int num_sums = 2, num_early_sums = 1, num_kept = 2;
    static constexpr bool needs_max = true;

    template <class T>
    struct State {
        T max, log_sum, value, alpha, gamma, own;
    };

    FL_HD static int passes(const double*) { return 2; }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        return {row.max, T(0), T(0), T(0), T(0), T(0)};
    }

    template <class T>
    FL_HD static Sums<T, 2> term(int pass, const State<T>& s, T z, T margin, math::mask_t<T> is_target,
                                 const T* params) {
        return pass == 1 ? term_keeping<true>(pass, s, z, margin, is_target, params, static_cast<T*>(nullptr))
                         : term_keeping<false>(pass, s, z, margin, is_target, params, static_cast<T*>(nullptr));
    }

    // Kept: exp(z - max), in the end p; W.
    template <bool last, class T>
    FL_HD static Sums<T, 2> term_keeping(int, const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T e = last && kept ? kept[0] : math::exp_not_positive(z - s.max);
        if (kept) kept[0] = e;
        if (!last) return {{e, T(0)}};
        const T p = e * math::exp_not_positive(-s.log_sum);
        const Share<T> share = Loss::share((z - s.max) - s.log_sum, p, params);
        if (kept) kept[0] = p, kept[1] = share.w;
        return {{share.n, share.w}};
    }

    template <class T>
    FL_HD static void end_pass(int pass, State<T>& s, const Sums<T, 2>& sums, const RowInputs<T>& row,
                               const T* params) {
        if (pass == 0) {
            s.log_sum = math::log(sums.v[0]);
            return;
        }
        const T log_p = (row.target_logit - s.max) - s.log_sum;
        const AffineRow<T> affine = Loss::eval(log_p, sums.v[0], sums.v[1], params);
        s.value = affine.value;
        s.alpha = affine.alpha;
        s.gamma = affine.gamma;
        s.own = own_gradient(affine, log_p, Loss::share(log_p, math::exp(log_p), params).w);
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, T z, T, math::mask_t<T> is_target, const T* params) {
        const T log_p = (z - s.max) - s.log_sum, p = math::exp_not_positive(log_p);
        const T kept[] = {p, Loss::share(log_p, p, params).w};
        return gradient_of_kept(s, kept, is_target, params);
    }

    template <class T>
    FL_HD static T gradient_of_kept(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T*) {
        return math::select(is_target, s.own, s.alpha * kept[0] + s.gamma * kept[1]);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
