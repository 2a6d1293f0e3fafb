// The operators' entries, as torch calls them (ops.cpp has their schemas): arguments are taken from `stack`, results
// are put there.
#pragma once

#include "ops/backend.h"
#include "ops/tensor.h"

namespace fused_losses {

void row_loss_constants(StableIValue* stack, std::uint64_t, std::uint64_t);
void packed_row_loss(StableIValue* stack, std::uint64_t, std::uint64_t);
void packed_row_loss_with_grad(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_with_grad(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_with_grad_(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_with_stats(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_backward(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_with_stats_and_grad(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_backward_(StableIValue* stack, std::uint64_t, std::uint64_t);
void mixed_loss(StableIValue* stack, std::uint64_t, std::uint64_t);
void mixed_loss_with_grad(StableIValue* stack, std::uint64_t, std::uint64_t);
void mixed_loss_backward(StableIValue* stack, std::uint64_t, std::uint64_t);
void mixed_loss_backward_(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_and_statistics(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_loss_with_grad_and_statistics(StableIValue* stack, std::uint64_t, std::uint64_t);
void row_statistics(StableIValue* stack, std::uint64_t, std::uint64_t);
void elr_rows_(StableIValue* stack, std::uint64_t, std::uint64_t);
void gjs_rows_(StableIValue* stack, std::uint64_t, std::uint64_t);
void rescale_logits(StableIValue* stack, std::uint64_t, std::uint64_t);
void rescale_logits_backward(StableIValue* stack, std::uint64_t, std::uint64_t);

void class_moments(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_constants(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_kept_target(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_mask(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_class_loss(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_loss(StableIValue* stack, std::uint64_t, std::uint64_t);
void z_error_loss_backward(StableIValue* stack, std::uint64_t, std::uint64_t);
void update_moments_(StableIValue* stack, std::uint64_t, std::uint64_t);

// The results of row statistics, to which it points `p`.
struct RowStatisticsTensors {
    Tensor stats, argmax;

    RowStatisticsTensors(RowProblem& p, DtypeCode acc, Device device);
};

inline const Backend& backend_of([[maybe_unused]] Device device) {
#ifdef FL_WITH_CUDA
    if (device.is_cuda()) return cuda_backend;
#endif
    return cpu_backend;
}

}  // namespace fused_losses
