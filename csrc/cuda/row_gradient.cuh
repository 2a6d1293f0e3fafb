// Gradient of softmax losses in one row: grad_j = scale (alpha p_j + beta [j = y] + gamma u_j), with
// p_j = exp(z_j - max) / sum. The coefficients are per-row numbers, so no loss is known here.
#pragma once

#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {

// alpha multiplies exp(z - max); all but max include the row's scale.
template <class A>
struct Coefficients {
    A max, alpha, beta, gamma;

    FL_DEVICE void scale(A by) {
        alpha *= by;
        beta *= by;
        gamma *= by;
    }

    FL_DEVICE A of_exponential(A e, A u, bool is_target) const {
        return alpha * e + gamma * u + (is_target ? beta : A(0));
    }

    FL_DEVICE A at(A z, A u, bool is_target) const { return of_exponential(math::exp(z - max), u, is_target); }
};

// The classes of a row are those of kThreads threads: one, a warp or the block.
template <int kThreads, class Stored, class Body>
FL_DEVICE void walk(const Stored* row, int classes, bool vectors, int lane, Body body) {
    if constexpr (kThreads == 1)
        for (int c = 0; c < classes; ++c) body(Count<1>{}, c);
    else
        walk_classes<kThreads>(row, classes, vectors, lane, body);
}

template <class Stored>
FL_DEVICE const Stored* logits_of(const RowProblem& p, const Row& row) {
    return as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
}

template <class Stored>
FL_DEVICE Stored* gradient_row(const RowProblem& p, const Row& row) {
    return static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
}

// Ignored rows: their logits are not read, they may be NaN.
template <int kThreads, class Stored>
FL_DEVICE void write_zeros(const RowProblem& p, const Row& row, int lane) {
    Stored* const grad = gradient_row<Stored>(p, row);
    const std::int64_t stride = p.grad_class_stride;
    walk<kThreads>(grad, static_cast<int>(p.num_classes), stride == 1, lane, [&]<int kCount>(Count<kCount>, int c) {
        const acc_t<Stored> zeros[kCount] = {};
        store(grad + c * stride, zeros);
    });
}

template <int kThreads, class Stored, bool kSpread>
FL_DEVICE void write_gradient(const RowArgs<acc_t<Stored>>& args, const Row& row, const Target& target,
                              const Coefficients<acc_t<Stored>>& coefficients, int lane) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    const Stored* const logits = logits_of<Stored>(p, row);
    Stored* const grad = gradient_row<Stored>(p, row);
    const std::int64_t from = p.logits_class_stride, to = p.grad_class_stride;
    const bool vectors = from == 1 && to == 1 && misalignment(logits) == misalignment(grad);
    const A bias = bias_of(args);
    const SpreadReader<Stored> spread(p, args, row);
    const int classes = static_cast<int>(p.num_classes);
    const auto at = [&](A z, int c) {
        const bool own = c == target.cls;
        return coefficients.at(own ? z + bias : z, kSpread ? spread(c) : A(0), own);
    };
    if constexpr (kThreads == 1) {
        for (int c = 0; c < classes; c += kClassesAtOnce) {
            A z[kClassesAtOnce];
#pragma unroll
            for (int k = 0; k < kClassesAtOnce; ++k) z[k] = c + k < classes ? to_acc(logits[(c + k) * from]) : A(0);
#pragma unroll
            for (int k = 0; k < kClassesAtOnce; ++k)
                if (c + k < classes) grad[(c + k) * to] = to_stored<Stored>(at(z[k], c + k));
        }
    } else {
        walk_classes<kThreads>(logits, classes, vectors, lane, [&]<int kCount>(Count<kCount>, int c) {
            A z[kCount];
            load(logits + c * from, z);
#pragma unroll
            for (int k = 0; k < kCount; ++k) z[k] = at(z[k], c + k);
            store(grad + c * to, z);
        });
    }
}

}  // namespace fused_losses::cuda
