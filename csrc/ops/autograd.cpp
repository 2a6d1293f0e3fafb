// Autograd of row_loss.
//
// The first derivative in the logits is fused. Under "mean" and "sum" the forward writes the gradient for an upstream
// gradient of 1 and backward scales it (CPU) or completes it where that was not right (CUDA); otherwise the forward
// saves a few numbers per row and backward recomputes. Every other kind of derivative is rare and goes through
// row_loss_reference, whose plain operations torch differentiates.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/checks.h"
#include "ops/row_loss_autograd.h"

namespace fused_losses {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What backward needs beyond tensors.
struct Scalars : torch::CustomClassHolder {
    explicit Scalars(const RowLossArgs& a)
        : loss(a.loss),
          params(a.params.begin(), a.params.end()),
          logit_bias(a.logit_bias),
          ignore_index(a.ignore_index),
          reduction(a.reduction) {}

    const std::string loss;
    const std::vector<double> params;
    const double logit_bias;
    const std::int64_t ignore_index;
    const std::string reduction;
};

bool is_one(const Tensor& t) {
    if (!t.is_cpu() || !is_plain(t)) return false;
    return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() == 1.0 : *t.const_data_ptr<float>() == 1.0f;
}

// Of the gradient that a CUDA forward has written, in AutogradContext::saved_data.
constexpr const char* kGradient = "gradient";

// Under create_graph the gradient must itself be differentiable, in the logits and in grad_loss.
Tensor differentiable_gradient(const Tensor& grad_loss, const RowLossArgs& args) {
    return torch::autograd::grad({row_loss_by_reference(args)}, {args.logits}, {grad_loss}, /*retain_graph=*/true,
                                 /*create_graph=*/true)[0];
}

class RowLossFunction : public torch::autograd::Function<RowLossFunction> {
public:
    // The logits are args.logits: apply() looks for differentiable inputs among its own arguments.
    static Tensor forward(AutogradContext* ctx, const Tensor& /*logits*/, const RowLossArgs& args) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        static const Operator<std::tuple<Tensor, Tensor>> with_grad("fused_losses::row_loss_with_grad");
        static const RowLossWithStats with_stats("fused_losses::row_loss_with_stats");
        if (forward_writes_gradient(args)) {
            auto [loss, grad] = with_grad(args);
            save_row_loss(ctx, args, args.target, {});
            ctx->saved_data[kGradient] = grad;
            return loss;
        }
        if (forward_may_write_gradient(args) && args.logits.is_cuda()) {
            static const Operator<std::tuple<Tensor, Tensor, Tensor, Tensor>> with_both(
                "fused_losses::row_loss_with_stats_and_grad");
            auto [loss, stats, denominator, grad] = with_both(args);
            save_row_loss(ctx, args, args.target, {stats, denominator});
            ctx->saved_data[kGradient] = grad;
            return loss;
        }
        auto [loss, stats, denominator] = with_stats(args);
        save_row_loss(ctx, args, args.target, {stats, denominator});
        return loss;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
        return {row_loss_gradient(ctx, grad_outputs[0]), Tensor()};
    }
};

template <class... A>
struct Autograd {
    static Tensor row_loss(A... a) {
        const RowLossArgs args{a...};
        if (needs_reference(args)) return row_loss_by_reference(args);
        if (at::GradMode::is_enabled() && args.logits.requires_grad()) return RowLossFunction::apply(args.logits, args);
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        static const Operator<Tensor> op("fused_losses::row_loss");
        return op(args);
    }
};

}  // namespace

Tensor row_loss_by_reference(const RowLossArgs& args) {
    static const Operator<Tensor> op("fused_losses::row_loss_reference");
    check_row_loss(args);
    return op(args);
}

void save_row_loss(AutogradContext* ctx, const RowLossArgs& args, const Tensor& target, variable_list more) {
    variable_list saved = {args.logits,
                           target,
                           or_undefined(args.weight),
                           or_undefined(args.sample_weight),
                           or_undefined(args.logit_bias_tensor),
                           or_undefined(args.margin)};
    for (Tensor& tensor : more) saved.push_back(std::move(tensor));
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["scalars"] = c10::IValue::make_capsule(c10::make_intrusive<Scalars>(args));
}

Tensor row_loss_gradient(AutogradContext* ctx, const Tensor& grad_loss) {
    const variable_list saved = ctx->get_saved_variables();
    const auto scalars = c10::static_intrusive_pointer_cast<Scalars>(ctx->saved_data["scalars"].toCapsule());
    const OptionalTensor weight = or_none(saved[2]), sample_weight = or_none(saved[3]), bias = or_none(saved[4]),
                         margin = or_none(saved[5]);
    const RowLossArgs args{saved[0],
                           saved[1],
                           weight,
                           sample_weight,
                           bias,
                           margin,
                           scalars->loss,
                           scalars->params,
                           scalars->logit_bias,
                           scalars->ignore_index,
                           scalars->reduction};
    if (at::GradMode::is_enabled()) return differentiable_gradient(grad_loss, args);
    const bool has_stats = saved.size() > 6;
    const Tensor stats = has_stats ? saved[6] : at::empty({0}, grad_loss.options());
    const Tensor denominator = has_stats ? saved[7] : stats;
    // The first backward completes the gradient in place and gives it away; later ones compute a new one.
    if (const auto written = ctx->saved_data.find(kGradient); written != ctx->saved_data.end()) {
        const Tensor grad = written->second.toTensor();
        ctx->saved_data.erase(written);
        if (grad.is_cuda()) {
            static const Operator<void, const Tensor&, const Tensor&, const Tensor&, const Tensor&> complete(
                "fused_losses::row_loss_backward_");
            complete(grad_loss, stats, denominator, grad, args);
            return grad;
        }
        if (is_one(grad_loss)) return grad;
        if (grad.scalar_type() != at::kBFloat16) return grad.mul_(grad_loss);  // it would be rounded twice
    }
    static const Operator<Tensor, const Tensor&, const Tensor&, const Tensor&> recompute(
        "fused_losses::row_loss_backward");
    return recompute(grad_loss, stats, denominator, args);
}

TORCH_LIBRARY_IMPL(fused_losses, Autograd, m) {
    m.impl("row_loss", &WithRowLossArgs<Autograd>::row_loss);
    for (const char* internal : {"row_loss_with_grad", "row_loss_with_stats", "row_loss_backward",
                                 "row_loss_with_stats_and_grad", "row_loss_backward_"})
        m.impl(internal, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_losses
