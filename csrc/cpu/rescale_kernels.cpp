// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/kernels.h"

#include "cpu/row_sums.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace {

// A row at a time, a vector of classes at a time: one pass for a sum, one that writes.
template <class Stored>
class RescaledRows {
    using A = acc_t<Stored>;
    using V = Vec<A>;

public:
    RescaledRows(const RowProblem& problem, const LogitRescale& rescale)
        : p(problem), of(rescale), parameter(A(of.parameter)), logits(p.num_classes), upstream(p.num_classes) {}

    void take(std::int64_t number) const {
        const std::int64_t outer = number / p.inner, row = number % p.inner;
        A& norm = static_cast<A*>(of.norms)[number];
        if (p.target && class_index(p, p.target_stride.at(outer, row)) == p.ignore_index) {
            if (!of.upstream) norm = A(0);
            return of.upstream ? zeros<Stored>(outer, row) : zeros<A>(outer, row);
        }
        const A* const z = logits.read(logits_at<Stored>(p, outer, row), p.logits_class_stride);
        if (of.upstream) return write_gradient(outer, row, z, RescaleFactor<A>(of.clips, parameter, norm));
        norm = std::sqrt(sum_of_row<A>(logits.padded, [&](std::int64_t c) FL_INLINE {
            const V x = unless_masked(V::load(z + c));
            return x * x;
        }));
        const V factor = RescaleFactor<A>(of.clips, parameter, norm).factor;
        RowBuffer<A>::write_row(p, grad_at<A>(p, outer, row), /*unordered=*/false,
                                [&](std::int64_t c, auto) FL_INLINE { return V::load(z + c) * factor; });
    }

private:
    void write_gradient(std::int64_t outer, std::int64_t row, const A* z, RescaleFactor<A> by) const {
        const A* const g =
            upstream.read(as<A>(of.upstream) + of.upstream_stride.at(outer, row), of.upstream_class_stride);
        const A dot = sum_of_row<A>(
            logits.padded, [&](std::int64_t c) FL_INLINE { return unless_masked(V::load(z + c)) * V::load(g + c); });
        const V factor = by.factor, along = by.slope * dot;
        RowBuffer<Stored>::write_row(p, grad_at<Stored>(p, outer, row), /*unordered=*/false,
                                     [&](std::int64_t c, auto) FL_INLINE {
                                         return V::load(g + c) * factor + unless_masked(V::load(z + c)) * along;
                                     });
    }

    template <class Written>
    void zeros(std::int64_t outer, std::int64_t row) const {
        RowBuffer<Written>::zero_gradient(p, grad_at<Written>(p, outer, row));
    }

    const RowProblem& p;
    const LogitRescale& of;
    const A parameter;
    const PaddedRow<A> logits, upstream;
};

void run(const RowProblem& p, const LogitRescale& of, std::int64_t begin, std::int64_t end) {
    visit_dtype(p.dtype, [&]<class Stored>() {
        const RescaledRows<Stored> rows(p, of);
        for (std::int64_t row = begin; row < end; ++row) rows.take(row);
    });
}

}  // namespace
}  // namespace FL_ISA

template <>
RescaleKernel rescale_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
