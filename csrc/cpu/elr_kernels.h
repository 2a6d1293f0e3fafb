// The boundary between the CPU driver of early-learning regularisation and its kernel, which is compiled once per
// instruction set.
#pragma once

#include "core/elr_memory.h"
#include "cpu/kernels.h"

namespace fused_losses {

// Of units [begin, end): p.row_values, p.grad (acc) if there is one, and the memory.
using ElrKernel = void (*)(const RowProblem& p, const ElrMemory& m, std::int64_t begin, std::int64_t end);

template <Isa>
ElrKernel elr_kernel();
template <>
ElrKernel elr_kernel<Isa::baseline>();
template <>
ElrKernel elr_kernel<Isa::avx2>();
template <>
ElrKernel elr_kernel<Isa::avx512>();

}  // namespace fused_losses
