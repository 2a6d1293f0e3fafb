// Compiled once per instruction set (FL_ISA), as kernels.cpp.
#include "cpu/rescale_kernels.h"

#include "cpu/row_buffer.h"
#include "cpu/row_sums.h"
#include "cpu/scratch.h"

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
        const A* const z = RowBuffer<Stored>::logits(p, outer, row, logits.data());
        if (of.upstream) return write_gradient(outer, row, z, RescaleFactor<A>(of.clips, parameter, norm));
        norm = std::sqrt(sum_of_row<A>(p.num_classes, [&](std::int64_t c, auto count) FL_INLINE {
            const V x = unless_masked(load_n_or(z + c, count, A(0)));
            return x * x;
        }));
        const V factor = RescaleFactor<A>(of.clips, parameter, norm).factor;
        RowBuffer<A>::write_row(p, grad_at<A>(p, outer, row), /*unordered=*/false,
                                [&](std::int64_t c, auto count)
                                    FL_INLINE { return load_n_or(z + c, count, A(0)) * factor; });
    }

private:
    void write_gradient(std::int64_t outer, std::int64_t row, const A* z, RescaleFactor<A> by) const {
        const A* g = as<A>(of.upstream) + of.upstream_stride.at(outer, row);
        if (of.upstream_class_stride != 1) {
            RowBuffer<A>::widen_row(g, of.upstream_class_stride, p.num_classes, upstream.data());
            g = upstream.data();
        }
        const A dot = sum_of_row<A>(p.num_classes, [&](std::int64_t c, auto count) FL_INLINE {
            return unless_masked(load_n_or(z + c, count, A(0))) * load_n_or(g + c, count, A(0));
        });
        const V factor = by.factor, along = by.slope * dot;
        RowBuffer<Stored>::write_row(
            p, grad_at<Stored>(p, outer, row), /*unordered=*/false, [&](std::int64_t c, auto count) FL_INLINE {
                return load_n_or(g + c, count, A(0)) * factor + unless_masked(load_n_or(z + c, count, A(0))) * along;
            });
    }

    template <class Written>
    void zeros(std::int64_t outer, std::int64_t row) const {
        RowBuffer<Written>::zero_gradient(p, grad_at<Written>(p, outer, row));
    }

    const RowProblem& p;
    const LogitRescale& of;
    const A parameter;
    const Scratch<A> logits, upstream;
};

template <class Stored>
void run_as(const RowProblem& p, const LogitRescale& of, std::int64_t begin, std::int64_t end) {
    const RescaledRows<Stored> rows(p, of);
    for (std::int64_t row = begin; row < end; ++row) rows.take(row);
}

void run(const RowProblem& p, const LogitRescale& of, std::int64_t begin, std::int64_t end) {
    switch (p.dtype) {
        case Dtype::kFloat64: return run_as<double>(p, of, begin, end);
        case Dtype::kFloat32: return run_as<float>(p, of, begin, end);
        case Dtype::kFloat16: return run_as<Half>(p, of, begin, end);
        case Dtype::kBFloat16: return run_as<BFloat16>(p, of, begin, end);
    }
}

}  // namespace
}  // namespace FL_ISA

template <>
RescaleKernel rescale_kernel<Isa::FL_ISA>() {
    return &Entry<run>::call;
}

}  // namespace fused_losses
