// Z-Error over any row loss (2506.02154), of the operators that both are made of.
//
// Where the training forward writes the gradient, the mask comes first and dropped rows are ignored rows. Elsewhere the
// rows' losses come first: statistics, mask and reduction follow in one kernel, the gradient in another.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "losses/registry.h"
#include "ops/checks.h"
#include "ops/row_loss_autograd.h"
#include "ops/z_error_args.h"

namespace fused_losses {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Result = std::tuple<Tensor, Tensor, Tensor>;  // loss, mask, scores

const OptionalTensor kAbsent;
const double kNoSmoothing[] = {0.0};

// How rows are judged.
struct Judgement {
    ZErrorRule rule;
    std::string_view statistic;
    bool with_scores;
};

Tensor row_values(const RowLossArgs& args) {
    static const Operator<Tensor> op("fused_losses::row_loss");
    return op(args);
}

// How the second half of the work, z_error_class_loss, judges rows by the losses that the first half has computed, and
// where those do not say it, by the logits. The class weights do not count; most losses are multiplied by them
// afterwards.
struct Plan {
    std::string_view statistic;
    bool by_values = false, unweighted = false;
    double label_smoothing = 0, logit_bias = 0;
    const OptionalTensor& logit_bias_tensor = kAbsent;
};

Plan plan_of(const RowLossArgs& a, std::string_view statistic) {
    const bool entropy = a.loss == CrossEntropy::name, smooth = entropy && a.params[0] != 0;
    if (statistic == "logit") return {"class"};
    if (statistic == "prob") {
        const bool plain = entropy && !smooth && a.logit_bias == 0 && !a.logit_bias_tensor && !a.weight;
        return {plain ? "class_prob" : "class_softmax", plain};
    }
    TORCH_CHECK_VALUE(statistic == "loss", "statistic must be 'logit', 'prob' or 'loss', got '", statistic, "'");
    // The sum over all classes, each with its weight, is no multiple of the sum without.
    if (smooth && a.weight)
        return {"class_cross_entropy", false, false, a.params[0], a.logit_bias, a.logit_bias_tensor};
    return {"class", true, a.weight.has_value()};
}

// The first half: one loss per row, without the weight of its sample.
RowLossArgs of_rows(const RowLossArgs& a, const Plan& plan) {
    return {a.logits,
            a.target,
            plan.unweighted ? kAbsent : a.weight,
            kAbsent,
            a.logit_bias_tensor,
            a.margin,
            a.loss,
            a.params,
            a.logit_bias,
            a.ignore_index,
            "none"};
}

struct ClassLoss {
    Tensor loss, denominator, mask, kept_target, scores, row_weight;
};

ClassLoss class_loss(const RowLossArgs& a, const Judgement& judgement, const Plan& plan, const Tensor& values) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_losses::z_error_class_loss", "")
                               .typed<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
                                   const Tensor&, const Tensor&, const Tensor&, c10::SymInt, const OptionalTensor&,
                                   const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                   const OptionalTensor&, at::ArrayRef<double>, std::string_view, std::int64_t, bool,
                                   std::int64_t, bool, std::string_view, double, double, bool, std::string_view)>();
    const ZErrorRule& rule = judgement.rule;
    auto [loss, denominator, mask, kept_target, scores, row_weight] =
        op.call(values, plan.by_values ? values : a.logits, a.target, a.logits.sym_size(class_dim_of(a.logits)),
                rule.moments, a.weight, a.sample_weight, plan.logit_bias_tensor, rule.threshold_tensor, rule.threshold,
                rule.tail, rule.min_count, rule.keep_small, a.ignore_index, judgement.with_scores, plan.statistic,
                plan.label_smoothing, plan.logit_bias, plan.unweighted, a.reduction);
    return {loss, denominator, mask, kept_target, scores, row_weight};
}

class ZErrorRowLoss : public torch::autograd::Function<ZErrorRowLoss> {
public:
    // The logits are args.logits: apply() looks for differentiable inputs among its own arguments.
    static variable_list forward(AutogradContext* ctx, const Tensor& /*logits*/, const RowLossArgs& args,
                                 const Judgement& judgement) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        static const RowLossWithStats with_stats("fused_losses::row_loss_with_stats");
        const Plan plan = plan_of(args, judgement.statistic);
        const RowLossArgs rows = of_rows(args, plan);
        const auto [values, stats, unused] = with_stats(rows);
        const ClassLoss result = class_loss(args, judgement, plan, values);
        const OptionalTensor row_weight(result.row_weight);
        save_row_loss(ctx,
                      {args.logits, args.target, rows.weight, plan.unweighted ? row_weight : args.sample_weight,
                       args.logit_bias_tensor, args.margin, args.loss, args.params, args.logit_bias, args.ignore_index,
                       args.reduction},
                      result.kept_target, {stats, result.denominator});
        ctx->mark_non_differentiable({result.mask, result.scores});
        return {result.loss, result.mask, result.scores};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
        return {row_loss_gradient(ctx, grad_outputs[0]), Tensor(), Tensor()};
    }
};

// Numbers that rows are judged by, or logits that hold them, in the words of z_error_mask.
struct Score {
    Tensor numbers;
    std::string_view statistic;
};

Score score_of(const RowLossArgs& a, std::string_view statistic) {
    if (statistic == "logit") return {a.logits, "class"};
    if (statistic == "prob")
        return {row_values({a.logits, a.target, kAbsent, kAbsent, kAbsent, kAbsent, CrossEntropy::name, kNoSmoothing,
                            0.0, a.ignore_index, "none"}),
                "class_prob"};
    TORCH_CHECK_VALUE(statistic == "loss", "statistic must be 'logit', 'prob' or 'loss', got '", statistic, "'");
    return {row_values({a.logits, a.target, kAbsent, kAbsent, a.logit_bias_tensor, a.margin, a.loss, a.params,
                        a.logit_bias, a.ignore_index, "none"}),
            "class"};
}

// The row loss of the rows that a mask keeps; the mask is a constant.
Result masked_first(const RowLossArgs& a, const Judgement& judgement) {
    using c10::Dispatcher;
    static const auto class_moments =
        Dispatcher::singleton()
            .findSchemaOrThrow("fused_losses::class_moments", "")
            .typed<Tensor(const Tensor&, const Tensor&, c10::SymInt, std::string_view, std::int64_t)>();
    static const auto z_error_mask =
        Dispatcher::singleton()
            .findSchemaOrThrow("fused_losses::z_error_mask", "")
            .typed<Result(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, at::ArrayRef<double>,
                          std::string_view, std::int64_t, bool, std::int64_t, bool, std::string_view)>();
    Tensor mask, kept_target, scores;
    {
        const at::NoGradGuard constant;
        const Tensor logits = a.logits.detach();
        const Score score = score_of({logits, a.target, a.weight, a.sample_weight, a.logit_bias_tensor, a.margin,
                                      a.loss, a.params, a.logit_bias, a.ignore_index, a.reduction},
                                     judgement.statistic);
        const ZErrorRule& rule = judgement.rule;
        const Tensor moments = rule.moments
                                   ? *rule.moments
                                   : class_moments.call(score.numbers, a.target, logits.sym_size(class_dim_of(logits)),
                                                        score.statistic, a.ignore_index);
        std::tie(mask, kept_target, scores) =
            z_error_mask.call(score.numbers, a.target, moments, rule.threshold_tensor, rule.threshold, rule.tail,
                              rule.min_count, rule.keep_small, a.ignore_index, judgement.with_scores, score.statistic);
    }
    const Tensor loss = row_values({a.logits, kept_target, a.weight, a.sample_weight, a.logit_bias_tensor, a.margin,
                                    a.loss, a.params, a.logit_bias, a.ignore_index, a.reduction});
    return {loss, mask, scores};
}

template <class... A>
struct Composite {
    static Result z_error_row_loss(A... a, const OptionalTensor& moments, const OptionalTensor& threshold_tensor,
                                   at::ArrayRef<double> threshold, std::string_view statistic, std::string_view tail,
                                   std::int64_t min_count, bool keep_small, bool with_scores) {
        const RowLossArgs args{a...};
        const Judgement judgement{
            {moments, threshold_tensor, threshold, tail, min_count, keep_small}, statistic, with_scores};
        check_logits(args);
        check_scores(args.logits, args.target, args.logits.sym_size(class_dim_of(args.logits)));
        const bool differentiate = at::GradMode::is_enabled() && args.logits.requires_grad();
        if (needs_reference(args) || (differentiate && forward_writes_gradient(args)))
            return masked_first(args, judgement);
        if (differentiate) {
            const variable_list out = ZErrorRowLoss::apply(args.logits, args, judgement);
            return {out[0], out[1], out[2]};
        }
        const Plan plan = plan_of(args, judgement.statistic);
        const ClassLoss result = class_loss(args, judgement, plan, row_values(of_rows(args, plan)));
        return {result.loss, result.mask, result.scores};
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, CompositeImplicitAutograd, m) {
    m.impl("z_error_row_loss", &WithRowLossArgs<Composite>::z_error_row_loss);
}

}  // namespace fused_losses
