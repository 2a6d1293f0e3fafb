// What kind of derivative a call asks for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fused_losses {

inline bool has_tangent(const at::Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }

inline bool is_differentiated(const at::Tensor& t) {
    return (at::GradMode::is_enabled() && t.requires_grad()) || has_tangent(t);
}

// Inside torch.func.grad, vmap, jvp, ...: functorch keeps this key included while its stack is not empty.
inline bool in_function_transform() {
    return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

}  // namespace fused_losses
