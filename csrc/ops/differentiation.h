// What kind of derivative a call asks for, and what its graph can save.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

namespace fused_losses {

inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

inline bool is_differentiated(const at::Tensor& t) {
    return (at::GradMode::is_enabled() && t.requires_grad()) || has_tangent(t);
}

// Inside torch.func.grad, vmap, jvp, ...: functorch keeps this key included while its stack is not empty.
inline bool in_function_transform() {
    return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Graphs save tensors; an optional one as a tensor that is undefined where it is absent, and back.
inline at::Tensor or_undefined(const std::optional<at::Tensor>& t) { return t ? *t : at::Tensor(); }
inline std::optional<at::Tensor> or_none(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

}  // namespace fused_losses
