// Autograd of the Z-Error operators. Statistics and masks are constants. The loss has a fused first derivative in its
// input; every other derivative goes through z_error_loss_reference, which torch differentiates, with the mask given.
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>

#include "ops/differentiation.h"
#include "ops/z_error_args.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using LossAndMore = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Signature>
auto find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor reference(const ZErrorLossArgs& a, const Tensor& mask) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    std::string_view, std::string_view)>("fused_losses::z_error_loss_reference");
    return op.call(a.input, a.target, mask, a.pos_weight, a.sample_weight, a.statistic, a.reduction);
}

// Reads statistics, judges rows and sums up, without derivatives.
LossAndMore evaluate(const ZErrorLossArgs& a, const ZErrorRule& rule, bool with_scores) {
    static const auto op =
        find<LossAndMore(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, at::ArrayRef<double>, std::string_view,
                         std::string_view, std::int64_t, bool, bool, std::string_view)>("fused_losses::z_error_loss");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(a.input, a.target, rule.moments, a.pos_weight, a.sample_weight, rule.threshold_tensor,
                   rule.threshold, a.statistic, rule.tail, rule.min_count, rule.keep_small, with_scores, a.reduction);
}

Tensor fused_gradient(const Tensor& grad_loss, const Tensor& denominator, const Tensor& mask, const ZErrorLossArgs& a) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                    const OptionalTensor&, std::string_view, std::string_view)>("fused_losses::z_error_loss_backward");
    return op.call(grad_loss, denominator, mask, a.input, a.target, a.pos_weight, a.sample_weight, a.statistic,
                   a.reduction);
}

class ZErrorFunction : public torch::autograd::Function<ZErrorFunction> {
public:
    // `input` is args.input: apply() looks for differentiable inputs among its own arguments.
    static variable_list forward(AutogradContext* ctx, const Tensor& input, const ZErrorLossArgs& args,
                                 const ZErrorRule& rule, bool with_scores) {
        auto [loss, denominator, mask, scores] = evaluate(args, rule, with_scores);
        ctx->save_for_backward(
            {input, args.target, or_undefined(args.pos_weight), or_undefined(args.sample_weight), denominator, mask});
        ctx->saved_data["statistic"] = std::string(args.statistic);
        ctx->saved_data["reduction"] = std::string(args.reduction);
        ctx->mark_non_differentiable({denominator, mask, scores});
        return {loss, denominator, mask, scores};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
        const variable_list saved = ctx->get_saved_variables();
        const OptionalTensor pos_weight = or_none(saved[2]), sample_weight = or_none(saved[3]);
        const std::string statistic = ctx->saved_data["statistic"].toStringRef();
        const std::string reduction = ctx->saved_data["reduction"].toStringRef();
        const ZErrorLossArgs args{saved[0], saved[1], pos_weight, sample_weight, statistic, reduction};
        if (!at::GradMode::is_enabled())
            return {fused_gradient(grad_outputs[0], saved[4], saved[5], args), Tensor(), Tensor(), Tensor()};
        // Under create_graph the gradient must itself be differentiable.
        return {torch::autograd::grad({reference(args, saved[5])}, {args.input}, {grad_outputs[0]},
                                      /*retain_graph=*/true, /*create_graph=*/true)[0],
                Tensor(), Tensor(), Tensor()};
    }
};

bool needs_reference(const ZErrorLossArgs& args) {
    return in_function_transform() || has_tangent(args.input) || is_differentiated(args.target) ||
           (args.pos_weight && is_differentiated(*args.pos_weight)) ||
           (args.sample_weight && is_differentiated(*args.sample_weight));
}

LossAndMore z_error_loss(const Tensor& input, const Tensor& target, const OptionalTensor& moments,
                         const OptionalTensor& pos_weight, const OptionalTensor& sample_weight,
                         const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                         std::string_view statistic, std::string_view tail, std::int64_t min_count, bool keep_small,
                         bool with_scores, std::string_view reduction) {
    const ZErrorLossArgs args{input, target, pos_weight, sample_weight, statistic, reduction};
    const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
    if (needs_reference(args)) {
        auto [loss, denominator, mask, scores] = evaluate(args, rule, with_scores);
        return {reference(args, mask), denominator, mask, scores};
    }
    if (!at::GradMode::is_enabled() || !input.requires_grad()) return evaluate(args, rule, with_scores);
    const variable_list out = ZErrorFunction::apply(input, args, rule, with_scores);
    return {out[0], out[1], out[2], out[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, Autograd, m) {
    m.impl("class_moments", torch::CppFunction::makeFallthrough());
    m.impl("z_error_mask", torch::CppFunction::makeFallthrough());
    m.impl("z_error_class_loss", torch::autograd::autogradNotImplementedFallback());
    m.impl("z_error_loss", &z_error_loss);
    m.impl("z_error_loss_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_losses
