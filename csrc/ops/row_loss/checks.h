// Argument checks of row losses, the same on every device.
#pragma once

#include "core/row_problem.h"
#include "losses/stats_count.h"
#include "ops/row_loss/args.h"

namespace fused_losses {

struct RowLossShape {
    bool soft_target;        // target holds probabilities
    std::int64_t class_dim;  // 0 for [C], else 1
    Shape rows;              // the shape of one number per row: logits without the class dimension
};

inline Shape without_class_dim(const Tensor& logits) {
    Shape rows;
    const std::int64_t class_dim = class_dim_of(logits);
    for (std::int64_t d = 0; d < logits.dim(); ++d)
        if (d != class_dim) rows.push_back(logits.size(d));
    return rows;
}

inline void check_logits(const RowLossArgs& args) {
    const Tensor& logits = args.logits;
    check(logits.is_floating(), args.loss, ": logits must be float64, float32, float16 or bfloat16, got ",
          logits.dtype());
    check(logits.dim() >= 1, args.loss, ": logits must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar");
    check_value(logits.size(class_dim_of(logits)) >= 1, args.loss, ": logits must have at least one class, got shape ",
                logits.sizes());
}

// Whether there is one number per row. That of a single row, logits [C], may have shape [1], as in torch.
inline bool is_per_row(const Tensor& t, const Sizes& rows) {
    return t.sizes() == rows || (rows.size() == 0 && t.dim() == 1 && t.size(0) == 1);
}

// Returns whether the target holds probabilities.
inline bool check_target(const RowLossArgs& args, const LossNeeds& needs, const Sizes& rows) {
    const Tensor &logits = args.logits, &target = args.target;
    check(target.device() == logits.device(), args.loss, ": target must be on the device of logits (", logits.device(),
          "), got ", target.device());
    if (target.dim() == logits.dim() && target.sizes() == logits.sizes()) {
        check(target.is_floating(), args.loss, ": Expected floating point type for target with class ",
              "probabilities (it has the shape of logits), got ", target.dtype(),
              "; one-hot labels are passed as class indices, target.argmax(", class_dim_of(logits), ")");
        check(needs.takes_probabilities, args.loss, ": target must hold class indices of shape ", rows,
              "; it takes no class probabilities, got shape ", target.sizes(),
              "; one-hot labels are passed as class indices, target.argmax(", class_dim_of(logits), ")");
        check(args.constants.ignore_index < 0, args.loss,
              ": ignore_index is not supported for floating point target, got ", args.constants.ignore_index);
        check_value(args.constants.logit_bias == 0 && !args.logit_bias_tensor, args.loss,
                    ": logit_bias is not supported for class probabilities, which have no single target class");
        return true;
    }
    check(holds_class_indices(target), args.loss,
          ": expected target dtype to be Long or Byte (or Int, Short) with shape ", rows, ", got ", target.dtype(),
          " with shape ", target.sizes());
    if (logits.dim() > 1 && target.dim() >= 1)
        check_value(target.size(0) == logits.size(0), args.loss, ": Expected input batch_size (", logits.size(0),
                    ") to match target batch_size (", target.size(0), ")");
    const bool one_channel = target.dim() == logits.dim() && target.dim() > 1 && target.size(1) == 1;
    check(is_per_row(target, rows), args.loss, ": Expected target size ", rows, " for logits of shape ", logits.sizes(),
          ", got ", target.sizes(), one_channel ? "; pass target.squeeze(1)" : "");
    return false;
}

inline void check_weights(const RowLossArgs& args, const Sizes& rows) {
    const Tensor& logits = args.logits;
    const std::int64_t num_classes = logits.size(class_dim_of(logits));
    if (args.weight) {
        check(args.weight->dim() == 1 && args.weight->size(0) == num_classes, args.loss,
              ": weight tensor should be defined either for all ", num_classes,
              " classes or no classes but got weight tensor of shape ", args.weight->sizes());
        check(args.weight->is_floating() && args.weight->device() == logits.device(), args.loss,
              ": weight must be a floating point tensor on the device of logits (", logits.device(), "), got ",
              args.weight->dtype(), " on ", args.weight->device());
    }
    if (args.sample_weight) {
        check(is_per_row(*args.sample_weight, rows), args.loss, ": sample_weight must have one entry per row, shape ",
              rows, ", got ", args.sample_weight->sizes());
        check(args.sample_weight->is_floating() && args.sample_weight->device() == logits.device(), args.loss,
              ": sample_weight must be a floating point tensor on the device of logits (", logits.device(), "), got ",
              args.sample_weight->dtype(), " on ", args.sample_weight->device());
    }
}

inline void check_logit_bias(const RowLossArgs& args) {
    if (!args.logit_bias_tensor) return;
    const Tensor& bias = *args.logit_bias_tensor;
    check_value(bias.dim() == 0 && bias.is_floating(), args.loss,
                ": logit_bias must be a float or a 0-dim floating point tensor, got ", bias.dtype(), " of shape ",
                bias.sizes());
    check(bias.device() == args.logits.device() || bias.device().is_cpu(), args.loss,
          ": logit_bias must be on the device of logits (", args.logits.device(), ") or on the CPU, got ",
          bias.device());
}

inline void check_first_param(const RowLossArgs& args, const LossNeeds& needs) {
    if (!args.first_param) return;
    check_value(needs.tensor_param, args.loss, ": has no parameter that may be a tensor");
    const Tensor &param = *args.first_param, &logits = args.logits;
    const std::int64_t num_classes = logits.size(class_dim_of(logits));
    check(param.is_floating() && param.device() == logits.device(), args.loss, ": ", needs.tensor_param,
          " must be a floating point tensor on the device of logits (", logits.device(), "), got ", param.dtype(),
          " on ", param.device());
    if (needs.has_margin) {
        check_value(param.dim() == 0 || (param.dim() == 1 && param.size(0) == num_classes), args.loss,
                    ": margin must be a number, 0-dim or of shape (", num_classes, ",), got shape ", param.sizes());
    } else {
        check_value(param.dim() == 0, args.loss, ": ", needs.tensor_param, " must be a number or 0-dim, got shape ",
                    param.sizes());
    }
}

inline void check_other_label(RowLossArgs& args, OtherLabel& other, const RowLossShape& shape) {
    check(!shape.soft_target, args.loss, ": class probabilities cannot be mixed with a second target");
    check_value(args.constants.logit_bias == 0 && !args.logit_bias_tensor, args.loss, ": logit_bias is for one target");
    const int loss = args.constants.loss;
    check_value(!is_multi_reduction_loss(loss), args.loss, ": takes one target only");
    std::swap(args.target, *other.target);
    const bool other_is_soft = check_target(args, needs_of(loss), shape.rows);
    std::swap(args.target, *other.target);
    check(!other_is_soft, args.loss, ": other_target must hold class indices, got class probabilities");
    if (!other.lam) return;
    const Tensor& lam = *other.lam;
    check(lam.is_floating() && lam.device() == args.logits.device() && is_per_row(lam, shape.rows), args.loss,
          ": lam must be a floating point tensor with one entry per row, shape ", Sizes(shape.rows),
          ", on the device of ", "logits (", args.logits.device(), "), got ", lam.dtype(), " of shape ", lam.sizes(),
          " on ", lam.device());
}

// Memory of the caller's for the gradient.
inline void check_given_grad(const RowLossArgs& args, const Tensor& grad) {
    const Tensor& logits = args.logits;
    check(grad.sizes() == logits.sizes() && grad.dtype() == logits.dtype() && grad.device() == logits.device(),
          args.loss, ": grad_logits must be like logits, ", logits.dtype(), " of shape ", logits.sizes(), " on ",
          logits.device(), ", got ", grad.dtype(), " of shape ", grad.sizes(), " on ", grad.device());
    for (std::int64_t d = 0; d < grad.dim(); ++d)
        check(grad.stride(d) != 0 || grad.size(d) <= 1, args.loss,
              ": grad_logits must have memory for every logit, got stride 0 in dimension ", d, " of shape ",
              grad.sizes());
    const auto address = reinterpret_cast<std::uintptr_t>(grad.const_data_ptr());
    check(address % bytes_of(dtype_of(*element_type(grad))) == 0, args.loss,
          ": grad_logits must begin at a multiple of its element's size, got address ", address);
}

inline RowLossShape check_row_loss(const RowLossArgs& args) {
    const LossNeeds needs = needs_of(args.constants.loss);
    check_logits(args);
    RowLossShape shape{false, class_dim_of(args.logits), without_class_dim(args.logits)};
    shape.soft_target = check_target(args, needs, shape.rows);
    check_weights(args, shape.rows);
    check_logit_bias(args);
    check_first_param(args, needs);
    check_value(args.logits.size(shape.class_dim) >= needs.min_classes, args.loss,
                ": logits must have at least two classes, got shape ", args.logits.sizes());
    return shape;
}

}  // namespace fused_losses
