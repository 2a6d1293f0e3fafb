// Argument checks of the Z-Error operators, the same on every device.
#pragma once

#include <string_view>

#include "ops/packed.h"
#include "ops/z_error/args.h"
#include "z_error/problem.h"
#include "z_error/rows.h"

namespace fused_losses {

inline Statistic parse_statistic(std::string_view name) {
    if (name == "class") return Statistic::kClassScore;
    if (name == "class_prob") return Statistic::kClassProb;
    if (name == "bce_logit") return Statistic::kBceLogit;
    if (name == "bce_prob") return Statistic::kBceProb;
    if (name == "mse_target") return Statistic::kMseTarget;
    if (name == "mse_loss") return Statistic::kMseLoss;
    check_value(name == "mse_residual", "statistic must be 'class', 'class_prob', 'bce_logit', 'bce_prob', ",
                "'mse_target', 'mse_loss' or 'mse_residual', got '", name, "'");
    return Statistic::kMseResidual;
}

inline Tail parse_tail(std::string_view name) {
    if (name == "both") return Tail::kBoth;
    if (name == "low") return Tail::kLow;
    check_value(name == "high", "tail must be 'both', 'low' or 'high', got '", name, "'");
    return Tail::kHigh;
}

inline Reduction parse_z_reduction(std::string_view name) {
    if (name == "mean") return Reduction::kMean;
    if (name == "sum") return Reduction::kSum;
    check_value(name == "none", "reduction must be 'none', 'mean' or 'sum', got '", name, "'");
    return Reduction::kNone;
}

// One number per row, a row being an entry of `like`.
inline void check_rows(const char* name, const Tensor& t, const Tensor& like) {
    check_floating(name, t);
    check_same_device(name, t, like);
    check_value(t.sizes() == like.sizes(), name, " must have one entry per row, shape ", like.sizes(), ", got ",
                t.sizes());
}

// Returns the dimension of the classes if args.input holds logits whose target's entry is the score, else -1.
inline std::int64_t check_scores(const ZErrorArgs& args, std::int64_t num_classes) {
    const Tensor &score = args.input, &target = args.target;
    check_floating("score", score);
    check_same_device("target", target, score);
    check(holds_class_indices(target), "target must hold class indices (int64, int32, int16 or uint8), got ",
          target.dtype());
    if (score.dim() == target.dim()) {
        check_value(score.sizes() == target.sizes(), "score must have one entry per row, shape ", target.sizes(),
                    ", got ", score.sizes());
        return -1;
    }
    check_value(score.dim() == target.dim() + 1, "score must have the shape of target, ", target.sizes(),
                ", or hold logits of shape (C,), (N, C) or (N, C, d1, ...), got ", score.sizes());
    const std::int64_t class_dim = class_dim_of(score);
    for (std::int64_t d = 0; d < target.dim(); ++d)
        check_value(target.size(d) == score.size(d < class_dim ? d : d + 1),
                    "target must have the shape of the logits without their classes, got ", target.sizes(),
                    " for logits of shape ", score.sizes());
    check_value(score.size(class_dim) == num_classes, "num_classes must be that of the logits, ", score.size(class_dim),
                ", got ", num_classes);
    return class_dim;
}

inline void check_class_loss(const ZErrorArgs& args) {
    if (args.logit_bias_tensor) {
        const Tensor& bias = *args.logit_bias_tensor;
        check_floating("logit_bias", bias);
        check_value(bias.dim() == 0, "logit_bias must be a number or 0-dim, got shape ", bias.sizes());
        check(bias.device() == args.input.device() || bias.device().is_cpu(),
              "logit_bias must be on the device of the input (", args.input.device(), ") or on the CPU, got ",
              bias.device());
    }
    check_rows("values", *args.values, args.target);
    if (args.sample_weight) check_rows("sample_weight", *args.sample_weight, args.target);
    if (!args.weight) return;
    check_floating("weight", *args.weight);
    check_same_device("weight", *args.weight, args.input);
    check_value(args.weight->dim() == 1 && args.weight->size(0) == args.num_classes, "weight must have shape (",
                args.num_classes, ",), got ", args.weight->sizes());
}

// What rows are judged by in z_error_class_loss.
struct ClassScore {
    Statistic statistic;
    bool entropy;  // of logits
};

inline ClassScore check_class_score(const ZErrorArgs& args, std::int64_t class_dim) {
    const std::string& name = args.statistic;
    const Tensor &score = args.input, &values = *args.values;
    const bool entropy = name == "class_cross_entropy" || name == "class_softmax";
    check_value(entropy || name == "class" || name == "class_prob",
                "statistic must be 'class', 'class_prob', 'class_cross_entropy' or 'class_softmax', got '", name, "'");
    check_value(!entropy || class_dim >= 0, "score must hold logits for statistic '", name, "', got shape ",
                score.sizes());
    check(!entropy || acc_of(values) == acc_of(score), "values must be float64 for float64 logits in score, and ",
          "only then, got ", values.dtype(), " and ", score.dtype());
    return {name == "class_prob" || name == "class_softmax" ? Statistic::kClassProb : Statistic::kClassScore, entropy};
}

inline Statistic check_class_statistic(const ZErrorArgs& args) {
    const Statistic statistic = parse_statistic(args.statistic);
    check_value(is_class(statistic), "statistic must be 'class' or 'class_prob', got '", args.statistic, "'");
    return statistic;
}

inline void check_pairs(const ZErrorArgs& args, Statistic statistic) {
    const Tensor &input = args.input, &target = args.target;
    check_floating("input", input);
    check_same_device("target", target, input);
    check_value(input.sizes() == target.sizes(), "target must have the shape of the input, ", input.sizes(), ", got ",
                target.sizes());
    if (!is_binary(statistic)) return check_floating("target", target);
    check_value(input.dim() >= 1, "logits must have shape (N,), (N, tasks) or (N, ..., tasks), got a scalar");
}

// Of binary and regression losses: the last of several dimensions.
inline std::int64_t tasks_of(const Tensor& input) { return input.dim() >= 2 ? input.sizes().back() : 1; }

// How many groups the rows of a binary or regression loss form.
inline std::int64_t groups_of(const Tensor& input, Statistic statistic) {
    return tasks_of(input) * (is_binary(statistic) ? 2 : 1);
}

// Returns the dimension of the classes, as check_scores.
inline std::int64_t check_moments(const ZErrorArgs& args, Statistic statistic) {
    check_value(args.num_classes >= 1, "num_classes must be at least 1, got ", args.num_classes);
    if (is_class(statistic)) return check_scores(args, args.num_classes);
    check_pairs(args, statistic);
    const std::int64_t groups = groups_of(args.input, statistic);
    check_value(groups == args.num_classes, "num_classes must be ", groups, " here, got ", args.num_classes);
    return -1;
}

inline void check_moments_of(std::int64_t groups, const Tensor& moments, const Tensor& input) {
    check(moments.dtype() == dtypes::float64, "moments must be float64, got ", moments.dtype());
    check_value(moments.dim() == 2 && moments.size(0) == 3 && moments.size(1) == groups, "moments must have shape (3, ",
                groups, "), got ", moments.sizes());
    check_same_device("moments", moments, input);
}

inline void check_rule(const ZErrorArgs& args, std::int64_t groups, bool binary) {
    const Tensor& input = args.input;
    if (args.moments) check_moments_of(groups, *args.moments, input);
    const auto fits = [&](std::int64_t n) { return n == 1 || n == groups || (binary && n == 2); };
    if (!args.threshold_tensor) {
        check_value(args.threshold.count == 1 || (binary && args.threshold.count == 2), "threshold must be one number",
                    binary ? " or two, for labels 0 and 1" : "", ", got ", args.threshold.count);
        return;
    }
    const Tensor& threshold = *args.threshold_tensor;
    check_floating("threshold", threshold);
    check_value(threshold.dim() <= 1 && fits(threshold.numel()), "threshold must be 0-dim or hold one ", "number per ",
                binary ? "label or per task and label" : "class", " (", groups, "), got shape ", threshold.sizes());
    check(threshold.device() == input.device() || (threshold.device().is_cpu() && threshold.dim() == 0),
          "threshold must be on the device of the input (", input.device(), ") or 0-dim on the CPU, got ",
          threshold.device(), " and shape ", threshold.sizes());
}

inline Statistic check_loss(const ZErrorArgs& args) {
    const Tensor& input = args.input;
    const Statistic statistic = parse_statistic(args.statistic);
    check_value(!is_class(statistic), "statistic '", args.statistic, "' has no loss of its own");
    check_pairs(args, statistic);
    if (args.sample_weight) check_rows("sample_weight", *args.sample_weight, input);
    if (!args.pos_weight) return statistic;
    const Tensor& pos_weight = *args.pos_weight;
    check_value(is_binary(statistic), "pos_weight is for the binary loss");
    check_floating("pos_weight", pos_weight);
    check_same_device("pos_weight", pos_weight, input);
    const std::int64_t tasks = tasks_of(input);
    check_value(pos_weight.dim() <= 1 && (pos_weight.numel() == 1 || pos_weight.numel() == tasks),
                "pos_weight must hold one number or one per task (", tasks, "), got shape ", pos_weight.sizes());
    return statistic;
}

// What forward has saved.
inline void check_saved(const ZErrorArgs& args, Reduction reduction) {
    const Tensor &input = args.input, &mask = args.mask, &denominator = args.denominator;
    check(mask.dtype() == dtypes::boolean && mask.device() == input.device() && mask.sizes() == input.sizes(),
          "mask must be the one that forward has saved, bool of shape ", input.sizes(), " on ", input.device(),
          ", got ", mask.dtype(), " of shape ", mask.sizes(), " on ", mask.device());
    const bool is_number =
        denominator.numel() == 1 && denominator.dtype() == acc_of(input) && denominator.device() == input.device();
    check(reduction != Reduction::kMean || is_number,
          "denominator must be the one that forward has saved, a number of ", acc_of(input), " on ", input.device(),
          ", got ", denominator.dtype(), " of shape ", denominator.sizes(), " on ", denominator.device());
}

// Of the targets, on the CPU.
inline void check_classes(const ZProblem& p) {
    for (std::int64_t i = 0; i < p.rows(); ++i) {
        const auto target = z_error::Row(p, i).of<std::int64_t>(p.target);
        const bool holds = target == p.ignore_index || z_error::group_of_class(p, target) >= 0;
        check_class(holds, target, i, p.num_groups, p.ignore_index);
    }
}

// What a call of z_error_kept_target says besides its tensors.
struct ZErrorConstants {
    Statistic statistic = Statistic::kClassScore;
    Tail tail = Tail::kBoth;
    bool by_entropy = false, keep_small = false;
    double threshold = 0, min_count = 0, momentum = 0;
    std::int64_t ignore_index = 0;

    static ZErrorConstants of(const ZErrorArgs& args, double threshold, double momentum) {
        const std::string& name = args.statistic;
        check_value(name == "logit" || name == "prob" || name == "loss",
                    "statistic must be 'logit', 'prob' or 'loss', got '", name, "'");
        ZErrorConstants constants;
        constants.statistic = name == "prob" ? Statistic::kClassProb : Statistic::kClassScore;
        constants.tail = parse_tail(args.tail);
        constants.by_entropy = name != "logit";
        constants.keep_small = args.keep_small;
        constants.threshold = threshold;
        constants.min_count = static_cast<double>(args.min_count);
        constants.momentum = momentum;
        constants.ignore_index = args.ignore_index;
        return constants;
    }

    static ZErrorConstants unpack(const Tensor& packed) {
        const auto constants = fused_losses::unpack<ZErrorConstants>(packed);
        check(constants && is_class(constants->statistic) && constants->tail <= Tail::kHigh,
              "constants must come from z_error_constants");
        return *constants;
    }

    void set_rule(ZProblem& p) const {
        p.tail = tail;
        p.min_count = min_count;
        p.keep_small = keep_small;
        p.thresholds[0] = threshold;
        p.ignore_index = ignore_index;
    }
};

}  // namespace fused_losses
