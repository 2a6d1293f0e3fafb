// What forward and gradient of a PassLoss share: the row's inputs, reductions whose result every thread of the row
// gets, and the choice of kernel.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>

#include "cuda/loss_output.cuh"
#include "cuda/row_gradient.cuh"
#include "cuda/staged_tile.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {

// Combines the numbers of all kThreads threads of a row (one, a warp, the block) in an order that depends on kThreads
// alone; each of them gets the result.
template <int kThreads, class A, class Combine>
FL_DEVICE A reduce_to_all(A x, Combine combine) {
    if constexpr (kThreads >= 32) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            const A other = __shfl_xor_sync(0xffffffffu, x, distance);
            // Both lanes of a pair must combine in the same order.
            x = (threadIdx.x & distance) ? combine(other, x) : combine(x, other);
        }
    }
    if constexpr (kThreads > 32) {
        constexpr int warps = kThreads / 32;
        __shared__ A of_warp[warps];
        __syncthreads();  // of_warp is free: everybody has read the previous result
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
        __syncthreads();
        x = of_warp[0];
        for (int i = 1; i < warps; ++i) x = combine(x, of_warp[i]);
    }
    return x;
}

// The margin of a class.
template <class A>
FL_DEVICE A margin_of(const RowArgs<A>& args, int cls) {
    const RowProblem& p = args.problem;
    return p.margin ? as<A>(p.margin)[cls * p.margin_stride] : args.params[0];
}

// dL/dz of a row's classes, from one state to the other's row or in place; times scale.
template <class Stored, class Loss, int kThreads, class State>
FL_DEVICE void write_pass_gradient(const RowArgs<acc_t<Stored>>& args, const Stored* from, std::int64_t from_stride,
                                   Stored* to, std::int64_t to_stride, int target, const State& state,
                                   acc_t<Stored> scale, int lane) {
    using A = acc_t<Stored>;
    const bool vectors = from_stride == 1 && to_stride == 1 && misalignment(from) == misalignment(to);
    const A bias = bias_of(args);
    walk<kThreads>(from, static_cast<int>(args.problem.num_classes), vectors, lane,
                   [&]<int kCount>(Count<kCount>, int c) {
                       A z[kCount];
                       load(from + c * from_stride, z);
#pragma unroll
                       for (int k = 0; k < kCount; ++k) {
                           const bool own = c + k == target;
                           const A biased = own ? z[k] + bias : z[k];
                           z[k] = scale * Loss::gradient(state, biased, margin_of(args, c + k), own, args.params);
                       }
                       store(to + c * to_stride, z);
                   });
}

// The loss whose kernels run another: one that equals it with other parameters. Saves instantiations.
template <class Loss>
struct RunAs {
    using type = Loss;
    static void convert(double*) {}
};
template <>
struct RunAs<OfShares<NFLRCE>> {  // its passive loss has MAE's formula
    using type = OfShares<NFLMAE>;
    static void convert(double*) {}
};
template <>
struct RunAs<OfShares<NFL>> {
    using type = OfShares<NFLMAE>;
    static void convert(double* params) {  // gamma, detach -> alpha, beta, gamma, detach, scale
        const double converted[] = {1, 0, params[0], params[1], 0};
        std::copy(std::begin(converted), std::end(converted), params);
    }
};

// Calls body.operator()<Stored, Loss, kThreads>(problem, blocks) with the kernel's loss and its parameters; kThreads =
// 0: staged.
template <class Body>
cudaError_t dispatch_pass(const RowProblem& given, Body body) {
    cudaError_t error = cudaErrorInvalidValue;
    RowProblem p = given;
    const auto with_loss = [&]<class Stored, class Loss>() {
        // Doubles are for checking, not for speed: one kernel serves all shapes and saves build time.
        if constexpr (std::is_same_v<Stored, double>) {
            return body.template operator()<Stored, Loss, 32>(p, blocks_for(p.rows(), kBlock / 32));
        } else {
            switch (regime_of(p)) {
                case Regime::kStaged: return body.template operator()<Stored, Loss, 0>(p, blocks_for(p.rows(), kBlock));
                case Regime::kThread: return body.template operator()<Stored, Loss, 1>(p, blocks_for(p.rows(), kBlock));
                case Regime::kLanes:
                case Regime::kWarp:
                    return body.template operator()<Stored, Loss, 32>(p, blocks_for(p.rows(), kBlock / 32));
                case Regime::kBlock: return body.template operator()<Stored, Loss, kBlock>(p, blocks_for(p.rows(), 1));
            }
            return cudaErrorInvalidValue;
        }
    };
    visit_pass_loss(p.loss, [&]<class Given>() {
        using Loss = typename RunAs<Given>::type;
        RunAs<Given>::convert(p.params);
        switch (p.dtype) {
            case Dtype::kFloat64: error = with_loss.template operator()<double, Loss>(); break;
            case Dtype::kFloat32: error = with_loss.template operator()<float, Loss>(); break;
            case Dtype::kFloat16: error = with_loss.template operator()<Half, Loss>(); break;
            case Dtype::kBFloat16: error = with_loss.template operator()<BFloat16, Loss>(); break;
        }
    });
    return error;
}

}  // namespace fused_losses::cuda
