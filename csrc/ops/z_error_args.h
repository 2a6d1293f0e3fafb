// Parameters of z_error_loss, in schema order, and their checks, shared by all kernels (sizes may be symbolic).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string_view>

#include "z_error/problem.h"

namespace fused_losses {

using OptionalTensor = std::optional<at::Tensor>;

// When is a row unlikely?
struct ZErrorRule {
    const OptionalTensor& moments;           // float64 [3, groups]; absent: those of the rows at hand
    const OptionalTensor& threshold_tensor;  // takes the place of threshold
    at::ArrayRef<double> threshold;          // one, one per group, or (binary) one per label
    std::string_view tail;
    std::int64_t min_count;
    bool keep_small;
};

struct ZErrorLossArgs {
    const at::Tensor& input;              // any shape; binary: [N] or [N, T]
    const at::Tensor& target;             // same shape
    const OptionalTensor& pos_weight;     // [1] or [T]
    const OptionalTensor& sample_weight;  // the shape of input
    std::string_view statistic;
    std::string_view reduction;
};

inline at::ScalarType acc_of(const at::Tensor& input) {
    return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline Statistic parse_statistic(std::string_view name) {
    if (name == "class") return Statistic::kClassScore;
    if (name == "class_prob") return Statistic::kClassProb;
    if (name == "bce_logit") return Statistic::kBceLogit;
    if (name == "bce_prob") return Statistic::kBceProb;
    if (name == "mse_target") return Statistic::kMseTarget;
    if (name == "mse_loss") return Statistic::kMseLoss;
    TORCH_CHECK_VALUE(name == "mse_residual", "statistic must be 'class', 'class_prob', 'bce_logit', 'bce_prob', ",
                      "'mse_target', 'mse_loss' or 'mse_residual', got '", name, "'");
    return Statistic::kMseResidual;
}

inline Tail parse_tail(std::string_view name) {
    if (name == "both") return Tail::kBoth;
    if (name == "low") return Tail::kLow;
    TORCH_CHECK_VALUE(name == "high", "tail must be 'both', 'low' or 'high', got '", name, "'");
    return Tail::kHigh;
}

inline Reduction parse_z_reduction(std::string_view name) {
    if (name == "mean") return Reduction::kMean;
    if (name == "sum") return Reduction::kSum;
    TORCH_CHECK_VALUE(name == "none", "reduction must be 'none', 'mean' or 'sum', got '", name, "'");
    return Reduction::kNone;
}

inline void check_floating(const char* name, const at::Tensor& t) {
    const auto dtype = t.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16, name,
                " must be float64, float32, float16 or bfloat16, got ", dtype);
}

inline void check_same_device(const char* name, const at::Tensor& t, const at::Tensor& input) {
    TORCH_CHECK(t.device() == input.device(), name, " must be on the device of the input (", input.device(), "), got ",
                t.device());
}

// Returns the dimension of the classes if `score` holds logits whose target's entry is the score, else -1.
inline std::int64_t check_scores(const at::Tensor& score, const at::Tensor& target, const c10::SymInt& num_classes) {
    check_floating("score", score);
    check_same_device("target", target, score);
    const auto dtype = target.scalar_type();
    TORCH_CHECK(dtype == at::kLong || dtype == at::kInt || dtype == at::kShort || dtype == at::kByte,
                "target must hold class indices (int64, int32, int16 or uint8), got ", dtype);
    if (score.dim() == target.dim()) {
        TORCH_CHECK_VALUE(score.sym_sizes() == target.sym_sizes(), "score must have one entry per row, shape ",
                          target.sym_sizes(), ", got ", score.sym_sizes());
        return -1;
    }
    TORCH_CHECK_VALUE(score.dim() == target.dim() + 1, "score must have the shape of target, ", target.sym_sizes(),
                      ", or hold logits of shape (C,), (N, C) or (N, C, d1, ...), got ", score.sym_sizes());
    const std::int64_t class_dim = score.dim() == 1 ? 0 : 1;
    for (std::int64_t d = 0; d < target.dim(); ++d)
        TORCH_CHECK_VALUE(target.sym_size(d) == score.sym_size(d < class_dim ? d : d + 1),
                          "target must have the shape of the logits without their classes, got ", target.sym_sizes(),
                          " for logits of shape ", score.sym_sizes());
    TORCH_CHECK_VALUE(score.sym_size(class_dim) == num_classes, "num_classes must be that of the logits, ",
                      score.sym_size(class_dim), ", got ", num_classes);
    return class_dim;
}

// values: the rows' losses; weight: of classes.
inline void check_class_loss(const at::Tensor& values, const at::Tensor& score, const at::Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& sample_weight,
                             const c10::SymInt& num_classes) {
    const auto of_rows = [&](const char* name, const at::Tensor& t) {
        check_floating(name, t);
        check_same_device(name, t, score);
        TORCH_CHECK_VALUE(t.sym_sizes() == target.sym_sizes(), name, " must have one entry per row, shape ",
                          target.sym_sizes(), ", got ", t.sym_sizes());
    };
    of_rows("values", values);
    if (sample_weight) of_rows("sample_weight", *sample_weight);
    if (!weight) return;
    check_floating("weight", *weight);
    check_same_device("weight", *weight, score);
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->sym_size(0) == num_classes, "weight must have shape (", num_classes,
                      ",), got ", weight->sym_sizes());
}

// What rows are judged by in z_error_class_loss.
struct ClassScore {
    Statistic statistic;
    bool entropy;  // of logits, with this smoothing and bias
    double label_smoothing, logit_bias;
    const OptionalTensor& logit_bias_tensor;
};

inline ClassScore check_class_score(const at::Tensor& values, const at::Tensor& score, std::int64_t class_dim,
                                    std::string_view name, double label_smoothing, double logit_bias,
                                    const OptionalTensor& logit_bias_tensor) {
    const bool entropy = name == "class_cross_entropy" || name == "class_softmax";
    TORCH_CHECK_VALUE(entropy || name == "class" || name == "class_prob",
                      "statistic must be 'class', 'class_prob', 'class_cross_entropy' or 'class_softmax', got '", name,
                      "'");
    TORCH_CHECK_VALUE(!entropy || class_dim >= 0, "score must hold logits for statistic '", name, "', got shape ",
                      score.sym_sizes());
    TORCH_CHECK(!entropy || acc_of(values) == acc_of(score), "values must be float64 for float64 logits in score, and ",
                "only then, got ", values.scalar_type(), " and ", score.scalar_type());
    const bool prob = name == "class_prob" || name == "class_softmax";
    return {prob ? Statistic::kClassProb : Statistic::kClassScore, entropy, label_smoothing, logit_bias,
            logit_bias_tensor};
}

inline Statistic check_class_statistic(std::string_view name) {
    const Statistic statistic = parse_statistic(name);
    TORCH_CHECK_VALUE(is_class(statistic), "statistic must be 'class' or 'class_prob', got '", name, "'");
    return statistic;
}

inline void check_pairs(const at::Tensor& input, const at::Tensor& target, Statistic statistic) {
    check_floating("input", input);
    check_same_device("target", target, input);
    TORCH_CHECK_VALUE(input.sym_sizes() == target.sym_sizes(), "target must have the shape of the input, ",
                      input.sym_sizes(), ", got ", target.sym_sizes());
    if (!is_binary(statistic)) {
        check_floating("target", target);
        return;
    }
    TORCH_CHECK_VALUE(input.dim() == 1 || input.dim() == 2, "logits must have shape (N,) or (N, tasks), got ",
                      input.sym_sizes());
}

// How many groups the rows of a binary or regression loss form.
inline c10::SymInt groups_of(const at::Tensor& input, Statistic statistic) {
    if (!is_binary(statistic)) return 1;
    return input.dim() == 2 ? input.sym_size(1) * 2 : c10::SymInt(2);
}

inline void check_rule(const ZErrorRule& rule, const at::Tensor& input, const c10::SymInt& groups, bool binary) {
    if (rule.moments) {
        const at::Tensor& moments = *rule.moments;
        TORCH_CHECK(moments.scalar_type() == at::kDouble, "moments must be float64, got ", moments.scalar_type());
        TORCH_CHECK_VALUE(moments.dim() == 2 && moments.sym_size(0) == 3 && moments.sym_size(1) == groups,
                          "moments must have shape (3, ", groups, "), got ", moments.sym_sizes());
        check_same_device("moments", moments, input);
    }
    const auto fits = [&](const c10::SymInt& n) { return n == 1 || n == groups || (binary && n == 2); };
    if (!rule.threshold_tensor) {
        TORCH_CHECK_VALUE(rule.threshold.size() == 1 || (binary && rule.threshold.size() == 2),
                          "threshold must be one number", binary ? " or two, for labels 0 and 1" : "", ", got ",
                          rule.threshold.size());
        return;
    }
    const at::Tensor& threshold = *rule.threshold_tensor;
    check_floating("threshold", threshold);
    TORCH_CHECK_VALUE(threshold.dim() <= 1 && fits(threshold.sym_numel()), "threshold must be 0-dim or hold one ",
                      "number per ", binary ? "label or per task and label" : "class", " (", groups, "), got shape ",
                      threshold.sym_sizes());
    TORCH_CHECK(threshold.device() == input.device() || (threshold.is_cpu() && threshold.dim() == 0),
                "threshold must be on the device of the input (", input.device(), ") or 0-dim on the CPU, got ",
                threshold.device(), " and shape ", threshold.sym_sizes());
}

inline void check_loss(const ZErrorLossArgs& args) {
    const Statistic statistic = parse_statistic(args.statistic);
    TORCH_CHECK_VALUE(!is_class(statistic), "statistic '", args.statistic, "' has no loss of its own");
    check_pairs(args.input, args.target, statistic);
    if (args.sample_weight) {
        check_floating("sample_weight", *args.sample_weight);
        check_same_device("sample_weight", *args.sample_weight, args.input);
        TORCH_CHECK_VALUE(args.sample_weight->sym_sizes() == args.input.sym_sizes(),
                          "sample_weight must have one entry per row, shape ", args.input.sym_sizes(), ", got ",
                          args.sample_weight->sym_sizes());
    }
    if (!args.pos_weight) return;
    TORCH_CHECK_VALUE(is_binary(statistic), "pos_weight is for the binary loss");
    check_floating("pos_weight", *args.pos_weight);
    check_same_device("pos_weight", *args.pos_weight, args.input);
    const c10::SymInt tasks = args.input.dim() == 2 ? args.input.sym_size(1) : c10::SymInt(1);
    TORCH_CHECK_VALUE(
        args.pos_weight->dim() <= 1 && (args.pos_weight->sym_numel() == 1 || args.pos_weight->sym_numel() == tasks),
        "pos_weight must hold one number or one per task (", tasks, "), got shape ", args.pos_weight->sym_sizes());
}

}  // namespace fused_losses
