// The boundary between the CPU driver of rescaled logits and its kernel, which is compiled once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "losses/rescale.h"

namespace fused_losses {

// Of rows [begin, end).
using RescaleKernel = void (*)(const RowProblem& p, const LogitRescale& of, std::int64_t begin, std::int64_t end);

template <Isa>
RescaleKernel rescale_kernel();
template <>
RescaleKernel rescale_kernel<Isa::baseline>();
template <>
RescaleKernel rescale_kernel<Isa::avx2>();
template <>
RescaleKernel rescale_kernel<Isa::avx512>();

}  // namespace fused_losses
