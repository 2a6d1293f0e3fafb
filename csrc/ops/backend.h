// What a device has to provide for row losses. Arguments are checked and outputs allocated before either is called.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/row_problem.h"

namespace fused_losses {

struct Backend {
    // Fills what is asked for: `loss` (0-dim acc; with Reduction::kNone it is p.row_values and nothing is left to do),
    // `denominator` (0-dim acc, the sum of the rows' weights; undefined if nobody wants it), p.stats, p.grad. On the
    // CPU the gradient includes p.upstream, and the loss may be undefined.
    void (*forward)(RowProblem& p, const at::Tensor& loss, const at::Tensor& denominator);
    // Fills p.grad from p.stats, p.upstream and p.denominator.
    void (*gradient)(const RowProblem& p);
};

Backend cpu_backend();
Backend cuda_backend();  // defined in builds with CUDA

}  // namespace fused_losses
