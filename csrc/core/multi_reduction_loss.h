// The contract of a loss that needs more of its row than the softmax sums: a few passes over the logits, each adding up
// some numbers per class, with a state per row in between. T is a float, a double, or a vector of them: on the CPU its
// elements are rows, or all the same where the vector runs over classes.
//
//     static constexpr const char* name;
//     static constexpr int num_params, num_sums;
//     static constexpr int num_early_sums;     passes but the last add to the first so many sums only
//     static constexpr int num_kept;           numbers per class that passes leave for the next and for the gradient
//     static constexpr bool needs_max;         whether RowInputs::max is to be found first
//     what it asks of its arguments (losses/needs.h), where that is not the default
//     template <class T> struct State;         numbers per row, floating point only; saved for backward as they are
//     passes(params) -> int                    where it is not two
//     begin(row, params) -> State
//     map<last>(pass, state, z, margin, is_target, params, T* kept) -> Sums      what one class adds
//     finalize(pass, state, sums, row, params)                                   sums over all classes
//     value(state) -> T
//     keep(state, z, margin, is_target, params, T* kept)                         what passes have left in the end
//     gradient(state, kept, is_target, params) -> T                              dL/dz of one class
//
// `last` says whether the pass is. Kept is null in `map` where there is no room: then every pass starts from the
// logit. On CUDA the last kept number has the logit's place: only a pass that is the last to need the logit may write
// it.
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
//
// Where the gradient is proportional to some numbers of the state:
//
//     scale(state, by)                                 multiplies them
//
// Where logits and gradient of 16 bits allow for shorter formulas: a loss `Coarse` that has them. Where usual
// parameters do:
//
//     visit_variant(const double* params, body)        body.operator()<Variant>() with the loss for them, or another
//     visit_usual(const double* params, body)          the same if there is one, for CUDA's rows in registers alone
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

constexpr int kMaxState = 7;

template <class Loss>
constexpr bool kHasBits =
    requires(typename Loss::template State<float> state) { Loss::gradient_of_bit(state, true, true); };

template <class Loss>
constexpr bool kAddsReciprocals =
    requires(typename Loss::template State<float> state) { Loss::early_input(state, 0.0f); };

template <class Loss, class T>
FL_HD int passes_of(const T* params) {
    if constexpr (requires { Loss::passes(params); })
        return Loss::passes(params);
    else
        return 2;
}

template <class State, class T>
constexpr int kStateSize = sizeof(State) / sizeof(T);

// Where nothing is kept: from the logit.
template <class Loss, class State, class T>
FL_HD T gradient_at(const State& s, T z, T margin, math::mask_t<T> is_target, const T* params) {
    T kept[Loss::num_kept];
    Loss::keep(s, z, margin, is_target, params, kept);
    return Loss::gradient(s, kept, is_target, params);
}

// ---- Losses n_y / sum_j n_j with n_j a function of log p_j ---------------------------------------------------------

// n_j and W_j = -dn_j / dlog p_j
template <class T>
struct NormalizedTerm {
    T n, w;
};

// From 1 / D, D = sum n_j: L = n_y / D, dL/dz_j = (W_y (p_j - [j = y]) - L (p_j sum W - W_j)) / D: affine in p with
// u_j = W_j.
template <class T>
FL_HD AffineRow<T> normalized_by(T of_one, const NormalizedTerm<T>& of_target, T sum_w) {
    const T value = of_target.n * of_one;
    return {value, (of_target.w - value * sum_w) * of_one, -of_target.w * of_one, value * of_one};
}

template <class T>
FL_HD AffineRow<T> normalized(const NormalizedTerm<T>& of_target, T sum_n, T sum_w) {
    return normalized_by(T(1) / sum_n, of_target, sum_w);
}

template <class T, int n>
struct NormalizedTerms {
    NormalizedTerm<T> of[n];
};

// dL/dz_j = alpha p_j + beta [j = y] + sum_i gamma[i] W_j of the i-th term
template <class T, int n>
struct NormalizedRow {
    T value, alpha, beta, gamma[n];
};

// Adapts a loss of one or two such sums:
//     static constexpr int num_terms;
//     terms(log_p, p, miss, params) -> NormalizedTerms       miss: 1 - p, no less than the smallest normal number
//     eval(log_p, own, sums, num_classes, params) -> NormalizedRow      own: of the target; sums: of n, of W, for each
//     term
// and, where it need not be kept because it follows from p and the first W:
//     second_w(p, w, params) -> T
// kCoarse: logits and gradient are numbers of 16 bits.
template <class Loss, bool kCoarse = false>
struct NormalizedLoss {
    using Coarse = NormalizedLoss<Loss, true>;

    static constexpr int num_terms = Loss::num_terms;
    static constexpr bool derives_second = requires(const float* params) { Loss::second_w(0.0f, 0.0f, params); };
    static constexpr const char* name = Loss::name;
    static constexpr int num_params = Loss::num_params, min_classes = Loss::min_classes;
    static constexpr int num_sums = 2 * num_terms, num_early_sums = 1;
    static constexpr int num_kept = derives_second ? num_terms : 1 + num_terms;
    static constexpr bool needs_max = true;

    template <class T>
    struct State {
        T max, log_sum, value, alpha, target_grad, gamma[num_terms];
    };

    template <class Body>
    static void visit_usual(const double* params, Body body)
        requires requires { Loss::visit_usual(params, body); }
    {
        Loss::visit_usual(params, [&]<class Usual>() { body.template operator()<NormalizedLoss<Usual>>(); });
    }

    template <class T>
    FL_HD static State<T> begin(const RowInputs<T>& row, const T*) {
        State<T> s{};
        s.max = row.max;
        return s;
    }

    // Kept: exp(z - max), in the end p; W of each term, but for one that follows.
    template <bool last, class T>
    FL_HD static Sums<T, num_sums> map(int, const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T e = last && kept ? kept[0] : math::exp_not_positive<kCoarse>(z - s.max);
        if (kept) kept[0] = e;
        Sums<T, num_sums> sums{};
        if (!last) {
            sums.v[0] = e;
            return sums;
        }
        const T p = e * math::exp_not_positive(-s.log_sum);
        const NormalizedTerms<T, num_terms> terms = terms_of(s, (z - s.max) - s.log_sum, p, params);
        if (kept) keep_terms(p, terms, kept);
        for (int i = 0; i < num_terms; ++i) sums.v[2 * i] = terms.of[i].n, sums.v[2 * i + 1] = terms.of[i].w;
        return sums;
    }

    template <class T>
    FL_HD static void finalize(int pass, State<T>& s, const Sums<T, num_sums>& sums, const RowInputs<T>& row,
                               const T* params) {
        if (pass == 0) {
            s.log_sum = math::log_of_sum<kCoarse>(sums.v[0]);
            return;
        }
        const T log_p = (row.target_logit - s.max) - s.log_sum, p = math::exp_not_positive(log_p);
        const T miss = miss_of(log_p, p);
        const NormalizedTerms<T, num_terms> own = Loss::terms(log_p, p, miss, params);
        const NormalizedRow<T, num_terms> of = Loss::eval(log_p, own, sums, row.num_classes, params);
        s.value = of.value;
        s.alpha = of.alpha;
        // As target_gradient.
        T rest = of.alpha + of.beta;
        for (int i = 0; i < num_terms; ++i) {
            s.gamma[i] = of.gamma[i];
            rest += of.gamma[i] * own.of[i].w;
        }
        s.target_grad = rest - of.alpha * miss;
    }

    template <class T>
    FL_HD static T value(const State<T>& s) {
        return s.value;
    }

    template <class T>
    FL_HD static void keep(const State<T>& s, T z, T, math::mask_t<T>, const T* params, T* kept) {
        const T log_p = (z - s.max) - s.log_sum, p = math::exp_not_positive<kCoarse>(log_p);
        keep_terms(p, terms_of(s, log_p, p, params), kept);
    }

    template <class T>
    FL_HD static T gradient(const State<T>& s, const T* kept, math::mask_t<T> is_target, const T* params) {
        T g = s.alpha * kept[0];
        for (int i = 0; i + 1 < num_kept; ++i) g += s.gamma[i] * kept[1 + i];
        if constexpr (derives_second) g += s.gamma[1] * Loss::second_w(kept[0], kept[1], params);
        return math::select(is_target, s.target_grad, g);
    }

    template <class T>
    FL_HD static void scale(State<T>& s, T by) {
        s.alpha *= by;
        s.target_grad *= by;
        for (T& gamma : s.gamma) gamma *= by;
    }

private:
    template <class T>
    FL_HD static T miss_of(T log_p, T p) {  // 1 - p
        return math::larger(-math::expm1_of(log_p, p), T(std::numeric_limits<math::scalar_t<T>>::min()));
    }

    // Of a class. None but that of the largest logit has more than half of the probability: what all others miss keeps
    // its digits in 1 - p, and what that one misses is worked out once a row.
    template <class T>
    FL_HD static NormalizedTerms<T, num_terms> terms_of(const State<T>& s, T log_p, T p, const T* params) {
        const T of_largest = miss_of(-s.log_sum, math::exp_not_positive(-s.log_sum));
        return Loss::terms(log_p, p, math::select(p > T(0.5), of_largest, T(1) - p), params);
    }

    template <class T>
    FL_HD static void keep_terms(T p, const NormalizedTerms<T, num_terms>& terms, T* kept) {
        kept[0] = p;
        for (int i = 0; i + 1 < num_kept; ++i) kept[1 + i] = terms.of[i].w;
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
