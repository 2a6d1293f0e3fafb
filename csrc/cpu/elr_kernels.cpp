// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/kernels.h"

#include "cpu/row_sums.h"
#include "losses/elr.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// A row at a time, a vector of classes at a time. Exponentials stay in scratch, and so does what is remembered.
template <class Stored, class Kept>
class ElrRows {
    using A = acc_t<Stored>;
    using V = Vec<A>;

public:
    ElrRows(const RowProblem& problem, const ElrMemory& memory)
        : p(problem),
          m(memory),
          beta(A(m.beta)),
          lam(A(m.lam)),
          logits(p.num_classes, -std::numeric_limits<A>::infinity()),
          padded(logits.padded),
          probabilities(padded),
          memory_row(p.num_classes),
          next(padded) {}

    bool take(std::int64_t number, bool writes) const {
        const std::int64_t outer = number / p.inner, row = number % p.inner;
        A* const grad = p.grad ? grad_at<A>(p, outer, row) : nullptr;
        A& value = static_cast<A*>(p.row_values)[number];
        const std::int64_t target = class_index(p, p.target_stride.at(outer, row));
        if (target == p.ignore_index) {
            value = A(0);
            if (grad) RowBuffer<A>::zero_gradient(p, grad);
            return false;
        }
        const A* const z = logits.read(logits_at<Stored>(p, outer, row), p.logits_class_stride);
        const A top = max_of_row(z, padded), sum = exponentials(z, top);
        Kept* const memory = static_cast<Kept*>(m.rows) + m.place[number] * p.num_classes;
        const A* t = memory_row.read(memory, 1);
        const bool usable = sum == sum, updates = m.updates && usable;
        if (updates) t = updated(t, A(1) / sum);
        const A rest = sum_of_row<A>(padded, [&](std::int64_t c) FL_INLINE {
            return probability_at(c, A(1) / sum) * (V(A(1)) - V::load(t + c));
        });
        const A log_p = (z[target] - top) - math::log_normal(sum);
        value = ELR::value(log_p, rest, lam);
        if (updates && writes) keep(t, memory);
        if (!grad) return usable;
        const A scale = m.scale ? as<A>(m.scale)[number] : A(1), rest_share = lam / rest;
        RowBuffer<A>::write_row(p, grad, /*unordered=*/false, [&](std::int64_t c, auto) FL_INLINE {
            return V(scale) * ELR::gradient(probability_at(c, A(1) / sum), V::load(t + c), V(lam), V(rest_share));
        });
        grad[target * p.grad_class_stride] = scale * ELR::target_gradient(log_p, t[target], lam, rest_share);
        return usable;
    }

private:
    // Leaves exp(z - top) in scratch and returns their sum.
    A exponentials(const A* z, A top) const {
        return sum_of_row<A>(padded, [&](std::int64_t c) FL_INLINE {
            const V e = exp_not_positive<Stored>(V::load(z + c) - V(top));
            e.store(probabilities.data() + c);
            return e;
        });
    }

    FL_ALWAYS_INLINE V probability_at(std::int64_t c, A of_sum) const {
        return V::load(probabilities.data() + c) * V(of_sum);
    }

    // What is remembered next, as the memory holds it.
    const A* updated(const A* t, A of_sum) const {
        const auto clamped = [&](std::int64_t c) FL_INLINE { return ELR::clamped(probability_at(c, of_sum)); };
        const A behind = A(padded - p.num_classes) * ELR::clamped(A(0));
        const V share = (A(1) - beta) / (sum_of_row<A>(padded, clamped) - behind);
        for (std::int64_t c = 0; c < padded; c += V::size)
            as_kept(ELR::remembered<Kept>(V::load(t + c), clamped(c), V(beta), share)).store(next.data() + c);
        return next.data();
    }

    // Doubles are for checking, not for speed.
    FL_ALWAYS_INLINE static V as_kept(V t) {
        if constexpr (sizeof(A) == 8)
            for (int i = 0; i < V::size; ++i) t.v[i] = widen(narrow<Kept>(static_cast<float>(t.v[i])));
        else if constexpr (sizeof(Kept) == 2)
            t = widen_bits<Kept, V>(narrow_bits<Kept>(t));
        return t;
    }

    void keep(const A* t, Kept* memory) const {
        if constexpr (std::is_same_v<Kept, A>)
            std::memcpy(memory, t, p.num_classes * sizeof(A));
        else if constexpr (sizeof(A) == 4)
            for_vectors<A>(p.num_classes,
                           [&](std::int64_t c, auto count) { store_n(memory + c, V::load(t + c), count); });
        else
            for (std::int64_t c = 0; c < p.num_classes; ++c) memory[c] = narrow<Kept>(static_cast<float>(t[c]));
    }

    const RowProblem& p;
    const ElrMemory& m;
    const A beta, lam;
    const PaddedRow<A> logits;
    const std::int64_t padded;
    const Scratch<A> probabilities;
    const PaddedRow<A> memory_row;
    const Scratch<A> next;
};

void run(const RowProblem& p, const ElrMemory& m, std::int64_t begin, std::int64_t end) {
    const auto all = [&](const auto& rows) {
        for (std::int64_t unit = begin; unit < end; ++unit)
            take_unit(m, unit, p.rows(), [&](std::int64_t row, bool writes) { return rows.take(row, writes); });
    };
    visit_dtype(p.dtype, [&]<class Stored>() {
        m.is_bfloat16 ? all(ElrRows<Stored, BFloat16>(p, m)) : all(ElrRows<Stored, float>(p, m));
    });
}

}  // namespace
}  // namespace FL_ISA

template <>
ElrKernel elr_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
