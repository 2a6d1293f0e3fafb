// What forward and gradient of a PassLoss share: the gradient of a row, and the choice of kernel.
#pragma once

#include <limits>
#include <type_traits>

#include "cuda/loss_output.cuh"
#include "cuda/row_gradient.cuh"
#include "cuda/staged_tile.cuh"
#include "losses/run_as.h"

namespace fused_losses::cuda {

// The margin of a class.
template <class A>
FL_DEVICE A margin_of(const RowArgs<A>& args, int cls) {
    const RowProblem& p = args.problem;
    return p.margin ? as<A>(p.margin)[cls * p.margin_stride] : args.params[0];
}

// What a thread works on at once: less for a long formula, whose registers and code grow with the number of classes.
template <class Loss, class Stored>
constexpr int kBytesAtOnce = kIsForChecking<Stored> ? sizeof(Stored) : 16;
template <class Stored>
constexpr int kBytesAtOnce<OfShares<NFLMAE>, Stored> = 8;
template <class Stored>
constexpr int kBytesAtOnce<OfShares<NFLSum>, Stored> = 8;
template <class Stored>
constexpr int kBytesAtOnce<BiTempered, Stored> = 4;
// ... in the passes of forward, which find their row in shared memory, where narrow accesses are cheap.
template <class Loss, class Stored>
constexpr int kBytesInPass = std::is_same_v<Loss, BiTempered> ? sizeof(Stored) : kBytesAtOnce<Loss, Stored>;

// dL/dz of the slice's classes, times scale, to the row `to` or in place.
template <class Loss, class Stored, class Team, class State>
FL_DEVICE void write_pass_gradient(const RowArgs<acc_t<Stored>>& args, const Team& team, const RowSlice<Stored>& slice,
                                   Stored* to, std::int64_t to_stride, int target, const State& state,
                                   acc_t<Stored> scale) {
    using A = acc_t<Stored>;
    to += slice.first * to_stride;
    const bool vectors = slice.stride == 1 && to_stride == 1;
    const A bias = bias_of(args);
    const auto body = [&]<int kCount>(Count<kCount>, int c) {
        A z[kCount];
        load_across(slice.logits + c * slice.stride, z);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const int cls = slice.first + c + k;
            const bool own = cls == target;
            z[k] = scale * gradient_at<Loss>(state, own ? z[k] + bias : z[k], margin_of(args, cls), own, args.params);
        }
        store(to + c * to_stride, z);
    };
    team.template walk<kBytesAtOnce<Loss, Stored>>(to, slice.count, vectors, body, slice.logits);
}

// Calls body.operator()<Stored>(problem) for the problem's dtype, with the parameters of the loss whose kernels Given
// runs.
template <class Given, class Body>
cudaError_t dispatch_pass(const RowProblem& given, Body body) {
    RowProblem p = given;
    RunAs<Given>::convert(p.params);
    switch (p.dtype) {
        case Dtype::kFloat64: return body.template operator()<double>(p);
        case Dtype::kFloat32: return body.template operator()<float>(p);
        case Dtype::kFloat16: return body.template operator()<Half>(p);
        case Dtype::kBFloat16: return body.template operator()<BFloat16>(p);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fused_losses::cuda
