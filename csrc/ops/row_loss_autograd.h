// What autograd of row losses is made of: what backward keeps, the gradient from it.
#pragma once

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "ops/differentiation.h"
#include "ops/row_loss_operator.h"

namespace fused_losses {

using at::Tensor;

using RowLossWithStats = Operator<std::tuple<Tensor, Tensor, Tensor>>;

// The value by plain differentiable operations.
Tensor row_loss_by_reference(const RowLossArgs& args);

// Whether the tensor's memory is there, not traced or wrapped.
inline bool is_plain(const Tensor& t) {
    const auto wrapped = c10::DispatchKeySet(
        {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched});
    return !t.key_set().has_any(wrapped) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// float16 cannot hold a gradient divided by the batch size before the loss scale of mixed precision has multiplied it,
// and a mean over active rows does not know the denominator before all rows are read: then only the CPU, which goes
// over them again, writes it. A traced backward must not depend on whether it is the first.
inline bool forward_may_write_gradient(const RowLossArgs& args) {
    const bool knows_upstream = args.reduction == "mean" || args.reduction == "sum" ||
                                (args.reduction == "active_mean" && args.logits.is_cpu());
    return knows_upstream && args.logits.scalar_type() != at::kHalf && is_plain(args.logits);
}

// Whether what forward writes is the gradient for an upstream gradient of 1. On CUDA it may turn out not to be.
inline bool forward_writes_gradient(const RowLossArgs& args) {
    return forward_may_write_gradient(args) && args.logits.is_cpu();
}

// Is anything asked for but the first derivative in the logits?
inline bool needs_reference(const RowLossArgs& args) {
    if (in_function_transform() || has_tangent(args.logits)) return true;
    for (const OptionalTensor* t : {&args.weight, &args.sample_weight, &args.logit_bias_tensor, &args.margin})
        if (*t && is_differentiated(**t)) return true;
    return is_differentiated(args.target);
}

// Saves what backward needs; `more`: stats and denominator, or nothing. The rows are those of `target`, which may
// differ from args.target.
void save_row_loss(torch::autograd::AutogradContext* ctx, const RowLossArgs& args, const Tensor& target,
                   torch::autograd::variable_list more);

// The gradient in the logits from what was saved.
Tensor row_loss_gradient(torch::autograd::AutogradContext* ctx, const Tensor& grad_loss);

}  // namespace fused_losses
