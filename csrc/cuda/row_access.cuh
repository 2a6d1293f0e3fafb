// How kernels reach a row: where it starts, its target and weights, and how a group of threads walks over its
// classes.
#pragma once

// The check of target ranges below is for users and has to survive release builds.
#undef NDEBUG
#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime_api.h>

#include "core/numeric.h"
#include "core/row_problem.h"
#include "core/softmax_loss.h"
#include "cuda/launch.h"
#include "losses/cross_entropy.h"

namespace fused_losses::cuda {

#define FL_DEVICE __device__ __forceinline__

template <class A>
FL_DEVICE const A* as(const void* pointer) {
    return static_cast<const A*>(pointer);
}

// For the compiler another number, that is known from here on: it keeps nothing that it has made of the first, and what
// is made of this one it does not find before.
template <class T>
FL_DEVICE T as_new(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4)
        asm volatile("" : "+r"(x));
    else
        asm volatile("" : "+l"(x));
#endif
    return x;
}

// Kernel argument. Arithmetic on doubles is slow on most GPUs, so the host converts the parameters.
template <class A>
struct RowArgs {
    RowProblem problem;
    LossOutput out;
    A params[kMaxParams];
    A bias;
    unsigned ignored_class;  // an ignored class within the range of labels, else none
    // Whether there are weights, and places for gradients and for what rows leave: asked for once a row, not for each
    // pointer.
    bool is_weighted, writes_gradient, keeps_rows;
    bool only_active;  // rows with a loss of 0 are none of those that the mean is of

    explicit RowArgs(const RowProblem& p, const LossOutput& output = {})
        : problem(p),
          out(output),
          bias(static_cast<A>(p.logit_bias)),
          ignored_class(p.ignore_index >= 0 && p.ignore_index < p.num_classes ? static_cast<unsigned>(p.ignore_index)
                                                                              : ~0u),
          is_weighted(p.class_weight || p.sample_weight),
          writes_gradient(p.grad),
          keeps_rows(p.row_values || p.stats),
          only_active(p.reduction == Reduction::kActiveMean) {
        for (int i = 0; i < kMaxParams; ++i) params[i] = static_cast<A>(p.params[i]);
    }
};

// The conversions of numbers of 16 bits are instructions. (Reading their headers would take a fifth of the time that
// nvcc needs before it comes to a kernel.)
template <class Stored>
FL_DEVICE acc_t<Stored> to_acc(Stored x) {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<Stored, Half>) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
        return y;
    }
#endif
    return widen(x);
}

template <class Stored>
FL_DEVICE Stored to_stored(acc_t<Stored> x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Stored) == 2) {
        Stored y;
        if constexpr (std::is_same_v<Stored, Half>)
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        else
            asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    }
#endif
    return narrow<Stored>(x);
}

// ---- One row -------------------------------------------------------------------------------------------------------

struct Row {
    std::int64_t number, outer, inner;
};

// Where rows follow each other, as numbers of 32 bits. Without a sign: then widening it is no instruction.
FL_DEVICE Row row_of_number(int number) { return {static_cast<unsigned>(number), 0, static_cast<unsigned>(number)}; }

FL_DEVICE Row row_at(const RowProblem& p, std::int64_t number) {
    if (p.outer == 1) return {number, 0, number};
    std::int64_t outer;
    if (((number | p.inner) >> 32) == 0)  // 64-bit division is a long subroutine
        outer = static_cast<std::uint32_t>(number) / static_cast<std::uint32_t>(p.inner);
    else
        outer = number / p.inner;
    return {number, outer, number - outer * p.inner};
}

struct Target {
    int cls;  // -1 with a soft target
    bool ignored;
};

FL_DEVICE std::int64_t read_index(IndexType type, const void* at) {
    if (type == IndexType::kInt64) return *as<std::int64_t>(at);  // first: nearly all are
    if (type == IndexType::kInt32) return *as<std::int32_t>(at);
    if (type == IndexType::kInt16) return *as<std::int16_t>(at);
    return *as<std::uint8_t>(at);
}

// A label on its way. Nobody waits for it before it is asked for: a check would be such a wait.
class LoadedLabel {
    unsigned low = 0, high = 1;  // high: 0 of less than 64 bits

public:
    LoadedLabel() = default;  // of no row
    FL_DEVICE LoadedLabel(IndexType type, const void* at) {
        if (type == IndexType::kInt64) {
            const uint2 both = *as<uint2>(at);
            low = both.x, high = both.y;
        } else {
            low = static_cast<unsigned>(read_index(type, at)), high = 0;
        }
    }
    // What nearly all are: a class that is not ignored.
    template <class A>
    FL_DEVICE bool is_class(const RowArgs<A>& args) const {
        return (high == 0) & (low < static_cast<unsigned>(args.problem.num_classes)) & (low != args.ignored_class);
    }
    FL_DEVICE int cls() const { return static_cast<int>(low); }
    FL_DEVICE std::int64_t index(IndexType type) const {
        const std::int64_t wide = static_cast<std::int64_t>(std::uint64_t(high) << 32 | low);
        return type == IndexType::kInt64 ? wide : static_cast<int>(low);
    }
};

FL_DEVICE LoadedLabel load_label(const RowProblem& p, const Row& row) {
    const std::int64_t offset = p.target_stride.at(row.outer, row.inner) * bytes_of(p.index_type);
    return {p.index_type, static_cast<const char*>(p.target) + offset};
}

// A class, or a number that stands for ignored ones.
FL_DEVICE int class_or(int ignored, const RowProblem& p, std::int64_t cls) {
    if (cls == p.ignore_index) return ignored;
    assert(static_cast<std::uint64_t>(cls) < static_cast<std::uint64_t>(p.num_classes) &&
           "fused_losses: target out of range");
    return static_cast<int>(cls);
}

// Of the label that lies so many bytes from the first.
FL_DEVICE int label_or(int ignored, const RowProblem& p, const void* labels, std::int64_t offset) {
    return class_or(ignored, p, read_index(p.index_type, static_cast<const char*>(labels) + offset));
}

FL_DEVICE Target target_of(const RowProblem& p, const Row& row) {
    if (!p.target) return {-1, false};
    const int cls = label_or(-1, p, p.target, p.target_stride.at(row.outer, row.inner) * bytes_of(p.index_type));
    return {max(cls, 0), cls < 0};
}

template <class A>
FL_DEVICE A bias_of(const RowArgs<A>& args) {
    const void* on_device = args.problem.logit_bias_device;
    return on_device ? *as<A>(on_device) : args.bias;
}

template <class A>
FL_DEVICE A class_weight_of(const RowProblem& p, const Target& target) {
    return p.class_weight && target.cls >= 0 ? as<A>(p.class_weight)[target.cls] : A(1);
}

template <class A>
FL_DEVICE A sample_weight_of(const RowProblem& p, const Row& row) {
    return p.sample_weight ? as<A>(p.sample_weight)[p.sample_weight_stride.at(row.outer, row.inner)] : A(1);
}

// What backward multiplies a row's gradient by, without and with its weight.
template <class A>
FL_DEVICE A upstream_over_denominator(const RowProblem& p, const Row& row) {
    const A denominator = p.denominator ? *as<A>(p.denominator) : A(1);
    const A inverse = denominator == A(0) ? A(0) : A(1) / denominator;
    return p.upstream ? as<A>(p.upstream)[p.upstream_stride.at(row.outer, row.inner)] * inverse : inverse;
}
template <class A>
FL_DEVICE A scale_of(const RowProblem& p, const Row& row) {
    return upstream_over_denominator<A>(p, row) * sample_weight_of<A>(p, row);
}

// u_j of SoftmaxRow: 1, the class weights, or the weighted and smoothed soft target; of ClassFactors::kClassLosses the
// weighted soft target.
template <class A>
class ClassFactorReader {
public:
    FL_DEVICE ClassFactorReader(const RowProblem& problem, const RowArgs<A>& args, const Row& row)
        : p(problem), offset(p.soft_target ? p.soft_target_stride.at(row.outer, row.inner) : 0) {
        if (p.class_factors == ClassFactors::kSoftTarget) smoothed = {args.params, A(p.num_classes)};
    }

    FL_DEVICE A operator()(int cls) const {
        if (p.class_factors <= ClassFactors::kOnes) return A(1);  // without u_j, any number will do
        const A weight = p.class_weight ? as<A>(p.class_weight)[cls] : A(1);
        if (!p.soft_target) return weight;
        const std::int64_t at = offset + cls * p.soft_target_class_stride;
        if (p.soft_target_is_stored && p.dtype == Dtype::kFloat16)
            return smoothed(A(to_acc(as<Half>(p.soft_target)[at])), weight);
        if (p.soft_target_is_stored && p.dtype == Dtype::kBFloat16)
            return smoothed(A(to_acc(as<BFloat16>(p.soft_target)[at])), weight);
        return smoothed(as<A>(p.soft_target)[at], weight);
    }

    // Whether they are a soft target, not weighted, in a row of neighbours; how that is stored, and what it becomes.
    FL_DEVICE bool is_plain() const { return p.soft_target && p.soft_target_class_stride == 1 && !p.class_weight; }
    template <class Label>
    FL_DEVICE const Label* labels() const {
        return as<Label>(p.soft_target) + offset;
    }
    FL_DEVICE A of_plain(A label) const { return smoothed(label, A(1)); }

private:
    const RowProblem& p;
    const std::int64_t offset;
    SmoothedTarget<A> smoothed;
};

// ---- Memory ------------------------------------------------------------------------------------------------------

template <class Stored>
constexpr int kVector = 16 / sizeof(Stored);  // elements of a 16-byte access

template <class Stored>
FL_DEVICE int misalignment(const Stored* pointer) {  // in elements
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(pointer) % 16 / sizeof(Stored));
}

// The same of shared memory, whose addresses have 32 bits.
template <class Stored>
FL_DEVICE int misalignment_in_tile(const Stored* pointer) {
#ifdef __CUDA_ARCH__
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer)) % 16 / sizeof(Stored);
#else
    return misalignment(pointer);
#endif
}

// Asks for the 128 bytes around an address, which need not be there, to be in the L2 cache before long.
FL_DEVICE void prefetch([[maybe_unused]] const void* at) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
#endif
}

// To global memory, by one instruction: an assignment may become one for each element, since the compiler sees through
// the vector to the elements that it was made of.
FL_DEVICE void store_at_once(uint4* to, uint4 x) {
#ifdef __CUDA_ARCH__
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
#else
    *to = x;
#endif
}

}  // namespace fused_losses::cuda
