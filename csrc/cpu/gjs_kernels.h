// The boundary between the CPU driver of the generalised Jensen-Shannon divergence and its kernel, which is compiled
// once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "losses/gjs.h"

namespace fused_losses {

// Of rows [begin, end): values and gradients.
using GjsKernel = void (*)(const RowProblem& p, const GjsViews& views, std::int64_t begin, std::int64_t end);

template <Isa>
GjsKernel gjs_kernel();
template <>
GjsKernel gjs_kernel<Isa::baseline>();
template <>
GjsKernel gjs_kernel<Isa::avx2>();
template <>
GjsKernel gjs_kernel<Isa::avx512>();

}  // namespace fused_losses
