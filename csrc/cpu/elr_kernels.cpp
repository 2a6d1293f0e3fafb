// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/elr_kernels.h"

#include "cpu/row_buffer.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"
#include "losses/elr.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// A row at a time, a vector of classes at a time. Exponentials stay in scratch, so that all but the first pass over a
// row are short.
template <class Stored, class Kept>
class ElrRows {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    static constexpr A kLowest = -std::numeric_limits<A>::infinity();

public:
    ElrRows(const RowProblem& problem, const ElrMemory& memory)
        : p(problem),
          m(memory),
          classes(p.num_classes),
          beta(A(m.beta)),
          lam(A(m.lam)),
          logits(RowBuffer<Stored>::reads_directly(p) ? 0 : classes),
          probabilities(classes),
          remembered(classes) {}

    bool take(std::int64_t number, bool writes) const {
        const std::int64_t outer = number / p.inner, row = number % p.inner;
        A* const grad = p.grad ? static_cast<A*>(p.grad) + p.grad_stride.at(outer, row) : nullptr;
        A& value = static_cast<A*>(p.row_values)[number];
        const std::int64_t target = class_index(p, p.target_stride.at(outer, row));
        if (target == p.ignore_index) {
            value = A(0);
            if (grad) RowBuffer<A>::zero_gradient(p, grad);
            return false;
        }
        const A* const z = RowBuffer<Stored>::logits(p, outer, row, logits.data());
        const A top = max_of_row(z, classes), sum = exponentials(z, top);
        Kept* const memory = static_cast<Kept*>(m.rows) + m.place[number] * classes;
        const bool usable = sum == sum;
        const A rest = m.updates && usable ? remember(memory, A(1) / sum, writes) : recall(memory, A(1) / sum);
        const A log_p = (z[target] - top) - math::log_normal(sum);
        value = ELR::value(log_p, rest, lam);
        if (grad) write_gradient(grad, m.scale ? as<A>(m.scale)[number] : A(1), lam / rest, target, log_p);
        return usable;
    }

private:
    // Leaves exp(z - top) in scratch and returns their sum.
    A exponentials(const A* z, A top) const {
        return sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V e = exp_not_positive<Stored>(load_n_or(z + c, count, kLowest) - V(top));
            store_n(probabilities.data() + c, e, count);
            return e;
        });
    }

    // Both make probabilities of the exponentials, leave what is remembered in scratch and return 1 - s.
    A recall(const Kept* memory, A of_sum) const {
        return sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V probability = probability_at(c, count, of_sum), t = kept_at(memory + c, count);
            store_n(probabilities.data() + c, probability, count);
            store_n(remembered.data() + c, t, count);
            return probability * (V(A(1)) - t);
        });
    }

    A remember(Kept* memory, A of_sum, bool writes) const {
        const A sum = sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            return without_rest(ELR::clamped(probability_at(c, count, of_sum)), count);
        });
        const V share = (A(1) - beta) / sum;
        return sum_of_row<A>(classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V probability = probability_at(c, count, of_sum);
            const V next = ELR::remembered<Kept>(kept_at(memory + c, count), ELR::clamped(probability), V(beta), share);
            const V t = writes ? keep(memory + c, count, next) : as_kept(next);
            store_n(probabilities.data() + c, probability, count);
            store_n(remembered.data() + c, t, count);
            return probability * (V(A(1)) - t);
        });
    }

    void write_gradient(A* grad, A scale, A rest_share, std::int64_t target, A log_p) const {
        RowBuffer<A>::write_row(p, grad, /*unordered=*/false, [&](std::int64_t c, auto count) FL_INLINE {
            const V t = load_n_or(remembered.data() + c, count, A(0));
            return V(scale) * ELR::gradient(probability_at(c, count, A(1)), t, V(lam), V(rest_share));
        });
        grad[target * p.grad_class_stride] =
            scale * ELR::target_gradient(log_p, remembered.data()[target], lam, rest_share);
    }

    template <class Count>
    V probability_at(std::int64_t c, Count count, A factor) const {
        return load_n_or(probabilities.data() + c, count, A(0)) * V(factor);
    }

    static V without_rest(V x, Whole) { return x; }
    static V without_rest(V x, int count) { return math::select(first_n<A>(count), x, V(A(0))); }

    // Doubles are for checking, not for speed.
    template <class Count>
    FL_ALWAYS_INLINE static V kept_at(const Kept* from, Count count) {
        if constexpr (sizeof(A) == 4) {
            return load_n_or(from, count, A(0));
        } else {
            V t = A(0);
            for (int i = 0; i < elements(count); ++i) t.v[i] = widen(from[i]);
            return t;
        }
    }

    // As it is when it has been kept.
    FL_ALWAYS_INLINE static V as_kept(V t) {
        if constexpr (sizeof(A) == 8)
            for (int i = 0; i < V::size; ++i) t.v[i] = widen(narrow<Kept>(static_cast<float>(t.v[i])));
        else if constexpr (sizeof(Kept) == 2)
            t = widen_bits<Kept, V>(narrow_bits<Kept>(t));
        return t;
    }

    template <class Count>
    FL_ALWAYS_INLINE static V keep(Kept* to, Count count, V t) {
        if constexpr (sizeof(A) == 4)
            store_n(to, t, count);
        else
            for (int i = 0; i < elements(count); ++i) to[i] = narrow<Kept>(static_cast<float>(t.v[i]));
        return as_kept(t);
    }

    static int elements(Whole) { return V::size; }
    static int elements(int count) { return count; }

    const RowProblem& p;
    const ElrMemory& m;
    const std::int64_t classes;
    const A beta, lam;
    const Scratch<A> logits, probabilities, remembered;
};

template <class Stored>
void run_as(const RowProblem& p, const ElrMemory& m, std::int64_t begin, std::int64_t end) {
    const auto run = [&](const auto& rows) {
        for (std::int64_t unit = begin; unit < end; ++unit)
            take_unit(m, unit, p.rows(), [&](std::int64_t row, bool writes) { return rows.take(row, writes); });
    };
    m.is_bfloat16 ? run(ElrRows<Stored, BFloat16>(p, m)) : run(ElrRows<Stored, float>(p, m));
}

void run(const RowProblem& p, const ElrMemory& m, std::int64_t begin, std::int64_t end) {
    switch (p.dtype) {
        case Dtype::kFloat64: return run_as<double>(p, m, begin, end);
        case Dtype::kFloat32: return run_as<float>(p, m, begin, end);
        case Dtype::kFloat16: return run_as<Half>(p, m, begin, end);
        case Dtype::kBFloat16: return run_as<BFloat16>(p, m, begin, end);
    }
}

}  // namespace
}  // namespace FL_ISA

template <>
ElrKernel elr_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
