// Gradient of softmax losses in one row: grad_j = scale (alpha p_j + beta [j = y] + gamma u_j), with
// p_j = exp(z_j - max) / sum. The coefficients are per-row numbers, so no loss is known here.
#pragma once

#include "core/math.h"
#include "cuda/launch.cuh"
#include "cuda/resident_row.cuh"

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

// Ignored rows: their logits are not used, they may be NaN. The classes are those of the team's slice.
template <class Stored, class Team>
FL_DEVICE void write_zeros(const RowProblem& p, const Team& team, const Row& row, const RowSlice<Stored>& slice) {
    const std::int64_t stride = p.grad_class_stride;
    Stored* const grad = gradient_row<Stored>(p, row) + slice.first * stride;
    team.walk(grad, slice.count, stride == 1, [&]<int kCount>(Count<kCount>, int c) {
        const acc_t<Stored> zeros[kCount] = {};
        store(grad + c * stride, zeros);
    });
}

template <class A, bool kSpread>
struct SoftmaxGradient {
    FL_DEVICE SoftmaxGradient(const RowArgs<A>& args, const Row& row, int own, const Coefficients<A>& c)
        : spread(args.problem, args, row), bias(bias_of(args)), target(own), coefficients(c) {}

    FL_DEVICE A operator()(A z, int c) const {
        const bool own = c == target;
        return coefficients.at(own ? z + bias : z, kSpread ? spread(c) : A(0), own);
    }

    const SpreadReader<A> spread;
    const A bias;
    const int target;
    const Coefficients<A>& coefficients;
};

// Some classes at a time: by a thread, or by a few that share a pixel.
template <bool kSpread, class Stored, class Team>
FL_DEVICE void write_column_gradient(const RowArgs<acc_t<Stored>>& args, const Team& team, const Row& row,
                                     const RowSlice<Stored>& slice, int target,
                                     const Coefficients<acc_t<Stored>>& coefficients) {
    using A = acc_t<Stored>;
    Stored* const grad = gradient_row<Stored>(args.problem, row);
    const std::int64_t from = slice.stride, to = args.problem.grad_class_stride;
    const SoftmaxGradient<A, kSpread> gradient(args, row, target, coefficients);
    for (int c = team.part * kClassesAtOnce; c < slice.count; c += team.parts * kClassesAtOnce) {
        A z[kClassesAtOnce];
#pragma unroll
        for (int k = 0; k < kClassesAtOnce; ++k)
            z[k] = c + k < slice.count ? to_acc(slice.logits[(c + k) * from]) : A(0);
#pragma unroll
        for (int k = 0; k < kClassesAtOnce; ++k)
            if (c + k < slice.count) grad[(c + k) * to] = to_stored<Stored>(gradient(z[k], c + k));
    }
}

template <bool kSpread, class Stored, class Team>
FL_DEVICE void write_gradient(const RowArgs<acc_t<Stored>>& args, const Team& team, const Row& row,
                              const RowSlice<Stored>& slice, int target,
                              const Coefficients<acc_t<Stored>>& coefficients) {
    if constexpr (Team::is_column) return write_column_gradient<kSpread>(args, team, row, slice, target, coefficients);
    using A = acc_t<Stored>;
    const std::int64_t from = slice.stride, to = args.problem.grad_class_stride;
    Stored* const grad = gradient_row<Stored>(args.problem, row) + slice.first * to;
    const SoftmaxGradient<A, kSpread> gradient(args, row, target, coefficients);
    const auto body = [&]<int kCount>(Count<kCount>, int c) {
        A z[kCount];
        load_across(slice.logits + c * from, z);
#pragma unroll
        for (int k = 0; k < kCount; ++k) z[k] = gradient(z[k], slice.first + c + k);
        store(grad + c * to, z);
    };
    team.walk(grad, slice.count, from == 1 && to == 1, body, slice.logits);
}

}  // namespace fused_losses::cuda
