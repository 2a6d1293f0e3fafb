// Losses of soft targets. With a share s_k for each class the value is sum_k s_k L_k, L_k the loss of label k, and
//
//     d/dz_j = (sum_k s_k alpha_k) p_j + s_j beta_j + sum_k s_k gamma_k.
//
// The pass that sums the exponentials gives the normaliser; one more over the same classes, which are in cache by then,
// evaluates all L_k and leaves p_j and s_j beta_j behind for the gradient.
#pragma once

#include <array>

#include "core/row_problem.h"
#include "cpu/memory.h"
#include "losses/registry.h"

namespace fused_losses {
inline namespace FL_ISA {

// Sums over the classes of one row, or of a vector of rows.
template <class V>
struct ClassLossSums {
    V value, alpha, gamma;
};

template <class A>
class ClassLosses {
    using V = Vec<A>;
    using Sums = ClassLossSums<V>;
    static constexpr int kSize = V::size;

public:
    // What all classes of a row have in common: max, log sum exp(z - max), and sum_j -log p_j where that is asked for.
    struct Row {
        V max, log_sum, sum_neg_log_p;
    };

    explicit ClassLosses(const RowProblem& p) : num_classes(A(p.num_classes)) {
        for (int i = 0; i < kMaxParams; ++i) params[i] = A(p.params[i]);
        if (p.class_factors != ClassFactors::kClassLosses) return;
        visit_loss(SoftmaxLosses{}, p.loss, [&]<class Loss>() {
            if constexpr (!std::is_same_v<Loss, CrossEntropy>) {  // which has a kernel of its own for them
                sums_logs = Loss::class_factors(p.params) == ClassFactors::kOnes;
                add = &add_as<Loss>;
            }
        });
    }

    // Whether the loss reads sum_neg_log_p. Its gradient then has a gamma.
    bool sums_logs = false;

    // Sums over n classes with logits x and shares s. Unless p is null, the probabilities are written to p, and
    // s_j beta_j, the part of the gradient that belongs to one class alone, takes the place of s_j. p may be x.
    Sums sum(const Row& row, const A* x, A* s, A* p, std::int64_t n) const {
        Sums all{V(A(0)), V(A(0)), V(A(0))};
        const std::int64_t vectors = n / kSize;
        for_runs(vectors, kVectorsPerRun, [&](std::int64_t begin, std::int64_t end) {
            const std::int64_t at = begin * kSize;
            add(*this, row, x + at, s + at, p ? p + at : nullptr, end - begin, all);
        });
        if (const auto rest = static_cast<int>(n % kSize))
            add_rest(row, x + n - rest, s + n - rest, p ? p + n - rest : p, rest, all);
        return all;
    }

private:
    template <class Loss>
    FL_NOINLINE static void add_as(const ClassLosses& of, const Row& given, const A* x, A* s, A* p,
                                   std::int64_t vectors, Sums& all) {
        // Copies: the compiler then knows that stores change none of them.
        const std::array<V, kMaxParams> params = of.params;
        const Row row = given;
        const V num_classes = of.num_classes;
        Sums sums{V(A(0)), V(A(0)), V(A(0))};
        for (std::int64_t i = 0; i < vectors; ++i, x += kSize, s += kSize, p += p ? kSize : 0) {
            const V below_max = V::load(x) - row.max, log_p = below_max - row.log_sum, share = V::load(s);
            if (p) math::exp(log_p).store(p);
            if (nonzero_bits(share) == 0) continue;  // where two labels are mixed nearly all are 0
            const AffineRow<V> affine = Loss::eval(
                SoftmaxRow<V>{log_p, row.sum_neg_log_p, num_classes, V(A(1)), num_classes, below_max}, params.data());
            // A class without a share contributes nothing, even at -inf.
            const auto absent = share == V(A(0));
            const auto times_share = [&](V of_class)
                                         FL_INLINE { return math::select(absent, V(A(0)), share * of_class); };
            sums.value += times_share(affine.value);
            sums.alpha += times_share(affine.alpha);
            sums.gamma += times_share(affine.gamma);
            if (p) times_share(affine.beta).store(s);
        }
        all.value += sums.value, all.alpha += sums.alpha, all.gamma += sums.gamma;
    }

    // The last classes, fewer than a vector has elements. The vector is filled up with classes without a share.
    void add_rest(const Row& row, const A* x, A* s, A* p, int n, Sums& all) const {
        alignas(64) A logits[kSize], shares[kSize];
        load_n_or(x, n, A(0)).store(logits);
        load_n_or(s, n, A(0)).store(shares);
        add(*this, row, logits, shares, p ? logits : nullptr, 1, all);
        if (!p) return;
        store_n(p, V::load(logits), n);
        store_n(s, V::load(shares), n);
    }

    std::array<V, kMaxParams> params;
    const V num_classes;
    void (*add)(const ClassLosses&, const Row&, const A*, A*, A*, std::int64_t, Sums&) = nullptr;
};

}  // namespace FL_ISA
}  // namespace fused_losses
