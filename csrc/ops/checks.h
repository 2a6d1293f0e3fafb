// Argument checks of row losses, shared by the CPU, CUDA and Meta kernels (sizes may be symbolic).
//
// Types of error follow torch: ValueError for batch sizes and value ranges, RuntimeError for shapes and dtypes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "core/row_problem.h"
#include "losses/names.h"
#include "losses/stats_count.h"
#include "ops/args.h"

namespace fused_losses {

struct RowLossShape {
    bool soft_target;        // target holds probabilities
    at::ScalarType acc;      // float64 for float64 logits, else float32: arithmetic, loss and stats
    std::int64_t class_dim;  // 0 for [C], else 1
    c10::SymDimVector rows;  // the shape of one number per row: logits without the class dimension
};

inline std::int64_t class_dim_of(const at::Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

inline c10::SymDimVector without_class_dim(const at::Tensor& logits) {
    c10::SymDimVector rows;
    const std::int64_t class_dim = class_dim_of(logits);
    for (std::int64_t d = 0; d < logits.dim(); ++d)
        if (d != class_dim) rows.push_back(logits.sym_size(d));
    return rows;
}

inline void check_logits(const RowLossArgs& args) {
    const at::Tensor& logits = args.logits;
    const auto dtype = logits.scalar_type();
    const bool supported = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
    TORCH_CHECK(supported, args.loss, ": logits must be float64, float32, float16 or bfloat16, got ", dtype);
    TORCH_CHECK(logits.dim() >= 1, args.loss, ": logits must have shape (C,), (N, C) or (N, C, d1, ...), got a scalar");
    TORCH_CHECK_VALUE(logits.sym_size(class_dim_of(logits)) >= 1, args.loss,
                      ": logits must have at least one class, got shape ", logits.sym_sizes());
}

// Returns whether the target holds probabilities.
inline bool check_target(const RowLossArgs& args, const c10::SymDimVector& rows) {
    const at::Tensor &logits = args.logits, &target = args.target;
    const auto dtype = target.scalar_type();
    const bool index = dtype == at::kLong || dtype == at::kInt || dtype == at::kShort || dtype == at::kByte;
    TORCH_CHECK(target.device() == logits.device(), args.loss, ": target must be on the device of logits (",
                logits.device(), "), got ", target.device());
    if (target.dim() == logits.dim() && target.sym_sizes() == logits.sym_sizes()) {
        TORCH_CHECK(at::isFloatingType(dtype), args.loss, ": Expected floating point type for target with class ",
                    "probabilities (it has the shape of logits), got ", dtype);
        TORCH_CHECK(args.loss == CrossEntropy::name, args.loss, ": target must hold class indices of shape ", rows,
                    "; only cross_entropy takes class probabilities, got shape ", target.sym_sizes());
        TORCH_CHECK(args.ignore_index < 0, args.loss, ": ignore_index is not supported for floating point target, got ",
                    args.ignore_index);
        TORCH_CHECK_VALUE(args.logit_bias == 0 && !args.logit_bias_tensor, args.loss,
                          ": logit_bias is not supported for class probabilities, which have no single target class");
        return true;
    }
    TORCH_CHECK(index, args.loss, ": expected target dtype to be Long or Byte (or Int, Short) with shape ", rows,
                ", got ", dtype, " with shape ", target.sym_sizes());
    if (logits.dim() > 1 && target.dim() >= 1)
        TORCH_CHECK_VALUE(target.sym_size(0) == logits.sym_size(0), args.loss, ": Expected input batch_size (",
                          logits.sym_size(0), ") to match target batch_size (", target.sym_size(0), ")");
    TORCH_CHECK(target.sym_sizes() == c10::SymIntArrayRef(rows), args.loss, ": Expected target size ", rows,
                " for logits of shape ", logits.sym_sizes(), ", got ", target.sym_sizes());
    return false;
}

inline void check_weights(const RowLossArgs& args, const c10::SymDimVector& rows) {
    const at::Tensor& logits = args.logits;
    const auto& num_classes = logits.sym_size(class_dim_of(logits));
    if (args.weight) {
        TORCH_CHECK(args.weight->dim() == 1 && args.weight->sym_size(0) == num_classes, args.loss,
                    ": weight tensor should be defined either for all ", num_classes,
                    " classes or no classes but got weight tensor of shape ", args.weight->sym_sizes());
        TORCH_CHECK(at::isFloatingType(args.weight->scalar_type()) && args.weight->device() == logits.device(),
                    args.loss, ": weight must be a floating point tensor on the device of logits (", logits.device(),
                    "), got ", args.weight->scalar_type(), " on ", args.weight->device());
    }
    if (args.sample_weight) {
        TORCH_CHECK(args.sample_weight->sym_sizes() == c10::SymIntArrayRef(rows), args.loss,
                    ": sample_weight must have one entry per row, shape ", rows, ", got ",
                    args.sample_weight->sym_sizes());
        TORCH_CHECK(
            at::isFloatingType(args.sample_weight->scalar_type()) && args.sample_weight->device() == logits.device(),
            args.loss, ": sample_weight must be a floating point tensor on the device of logits (", logits.device(),
            "), got ", args.sample_weight->scalar_type(), " on ", args.sample_weight->device());
    }
}

inline void check_logit_bias(const RowLossArgs& args) {
    if (!args.logit_bias_tensor) return;
    const at::Tensor& bias = *args.logit_bias_tensor;
    TORCH_CHECK_VALUE(bias.dim() == 0 && at::isFloatingType(bias.scalar_type()), args.loss,
                      ": logit_bias must be a float or a 0-dim floating point tensor, got ", bias.scalar_type(),
                      " of shape ", bias.sym_sizes());
    TORCH_CHECK(bias.device() == args.logits.device() || bias.device().is_cpu(), args.loss,
                ": logit_bias must be on the device of logits (", args.logits.device(), ") or on the CPU, got ",
                bias.device());
}

inline bool has_margin(const RowLossArgs& args) { return args.loss == HEM::name || args.loss == MultiMargin::name; }

inline void check_margin(const RowLossArgs& args) {
    if (!args.margin) return;
    const at::Tensor &margin = *args.margin, &logits = args.logits;
    TORCH_CHECK_VALUE(has_margin(args), args.loss, ": margin is for margin losses only");
    const auto& num_classes = logits.sym_size(class_dim_of(logits));
    TORCH_CHECK(at::isFloatingType(margin.scalar_type()) && margin.device() == logits.device(), args.loss,
                ": margin must be a floating point tensor on the device of logits (", logits.device(), "), got ",
                margin.scalar_type(), " on ", margin.device());
    TORCH_CHECK_VALUE(margin.dim() == 0 || (margin.dim() == 1 && margin.sym_size(0) == num_classes), args.loss,
                      ": margin must be a number, 0-dim or of shape (", num_classes, ",), got shape ",
                      margin.sym_sizes());
}

inline Reduction parse_reduction(const RowLossArgs& args) {
    if (args.reduction == "active_mean" && has_margin(args)) return Reduction::kActiveMean;
    if (args.reduction == "mean") return Reduction::kMean;
    if (args.reduction == "sum") return Reduction::kSum;
    TORCH_CHECK_VALUE(args.reduction == "none", args.loss, ": reduction must be ",
                      has_margin(args) ? "'none', 'mean', 'sum' or 'active_mean'" : "'none', 'mean' or 'sum'",
                      ", got '", args.reduction, "'");
    return Reduction::kNone;
}

inline int find_loss(const RowLossArgs& args) {
    const int index = index_of(AllLosses{}, args.loss);
    TORCH_CHECK_VALUE(index >= 0, "loss must be one of the names in loss_names(), got '", args.loss, "'");
    int expected = 0;
    visit_loss(AllLosses{}, index, [&]<class Loss>() { expected = Loss::num_params; });
    TORCH_CHECK_VALUE(static_cast<int>(args.params.size()) == expected, args.loss, ": params must hold ", expected,
                      " numbers, got ", args.params.size());
    return index;
}

inline RowLossShape check_row_loss(const RowLossArgs& args) {
    check_logits(args);
    RowLossShape shape{false, args.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
                       class_dim_of(args.logits), without_class_dim(args.logits)};
    shape.soft_target = check_target(args, shape.rows);
    check_weights(args, shape.rows);
    check_logit_bias(args);
    check_margin(args);
    const bool normalized = args.loss.starts_with("nce") || args.loss.starts_with("nfl") || args.loss == NGCE::name;
    const auto& num_classes = args.logits.sym_size(shape.class_dim);
    TORCH_CHECK_VALUE(!normalized || num_classes >= 2, args.loss, ": logits must have at least two classes, got shape ",
                      args.logits.sym_sizes());
    return shape;
}

}  // namespace fused_losses
