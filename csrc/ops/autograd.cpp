// Autograd of row_loss.
//
// The first derivative in the logits is fused. Under "mean" and "sum" the forward writes the gradient for an upstream
// gradient of 1 and backward scales it; otherwise the forward saves a few numbers per row and backward recomputes.
// Every other kind of derivative is rare and goes through row_loss_reference, whose plain operations torch
// differentiates.
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "ops/args.h"
#include "ops/checks.h"
#include "ops/differentiation.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operator whose parameters are Extra... followed by those of RowLossArgs.
template <class Return, class... Extra>
class Operator {
    template <class... A>
    using Handle = c10::TypedOperatorHandle<Return(Extra..., A...)>;

    template <class... A>
    struct Find {
        static auto handle(const char* name) {
            return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Return(Extra..., A...)>();
        }
    };

public:
    explicit Operator(const char* name) : handle(WithRowLossArgs<Find>::handle(name)) {}

    Return operator()(Extra... extra, const RowLossArgs& a) const {
        return handle.call(extra..., a.logits, a.target, a.weight, a.sample_weight, a.logit_bias_tensor, a.margin,
                           a.loss, a.params, a.logit_bias, a.ignore_index, a.reduction);
    }

private:
    WithRowLossArgs<Handle> handle;
};

Tensor reference(const RowLossArgs& args) {
    static const Operator<Tensor> op("fused_losses::row_loss_reference");
    check_row_loss(args);
    return op(args);
}

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

// float16 cannot hold a gradient divided by the batch size before the loss scale of mixed precision has multiplied it,
// and a CUDA forward or a mean over active rows does not know the denominator before all rows are read.
bool forward_writes_gradient(const RowLossArgs& args) {
    return (args.reduction == "mean" || args.reduction == "sum") && args.logits.scalar_type() != at::kHalf &&
           args.logits.is_cpu();
}

// Whether the tensor's numbers are there to be looked at without synchronising or tracing.
bool is_plain_cpu(const Tensor& t) {
    const auto wrapped = c10::DispatchKeySet(
        {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchBatched});
    return t.is_cpu() && !t.key_set().has_any(wrapped) && !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool is_one(const Tensor& t) {
    if (!is_plain_cpu(t)) return false;
    return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() == 1.0 : *t.const_data_ptr<float>() == 1.0f;
}

Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }

OptionalTensor or_none(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

class RowLossFunction : public torch::autograd::Function<RowLossFunction> {
public:
    // `logits` is args.logits: apply() looks for differentiable inputs among its own arguments.
    static Tensor forward(AutogradContext* ctx, const Tensor& logits, const RowLossArgs& args) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        static const Operator<std::tuple<Tensor, Tensor>> with_grad("fused_losses::row_loss_with_grad");
        static const Operator<std::tuple<Tensor, Tensor, Tensor>> with_stats("fused_losses::row_loss_with_stats");
        ctx->saved_data["scalars"] = c10::IValue::make_capsule(c10::make_intrusive<Scalars>(args));
        variable_list saved = {logits,
                               args.target,
                               or_undefined(args.weight),
                               or_undefined(args.sample_weight),
                               or_undefined(args.logit_bias_tensor),
                               or_undefined(args.margin)};
        Tensor loss;
        if (forward_writes_gradient(args)) {
            Tensor grad;
            std::tie(loss, grad) = with_grad(args);
            saved.push_back(std::move(grad));
        } else {
            Tensor stats, denominator;
            std::tie(loss, stats, denominator) = with_stats(args);
            saved.push_back(std::move(stats));
            saved.push_back(std::move(denominator));
        }
        ctx->save_for_backward(std::move(saved));
        return loss;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
        const Tensor& grad_loss = grad_outputs[0];
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
        const bool gradient_is_written = saved.size() == 7;
        if (at::GradMode::is_enabled()) return {differentiable(grad_loss, args), Tensor()};
        if (gradient_is_written) return {is_one(grad_loss) ? saved[6] : at::mul(saved[6], grad_loss), Tensor()};
        static const Operator<Tensor, const Tensor&, const Tensor&, const Tensor&> recompute(
            "fused_losses::row_loss_backward");
        return {recompute(grad_loss, saved[6], saved[7], args), Tensor()};
    }

private:
    // Under create_graph the gradient must itself be differentiable, in the logits and in grad_loss.
    static Tensor differentiable(const Tensor& grad_loss, const RowLossArgs& args) {
        return torch::autograd::grad({reference(args)}, {args.logits}, {grad_loss}, /*retain_graph=*/true,
                                     /*create_graph=*/true)[0];
    }
};

// Is anything asked for but the first derivative in the logits?
bool needs_reference(const RowLossArgs& args) {
    if (in_function_transform() || has_tangent(args.logits)) return true;
    for (const OptionalTensor* t : {&args.weight, &args.sample_weight, &args.logit_bias_tensor, &args.margin})
        if (*t && is_differentiated(**t)) return true;
    return is_differentiated(args.target);
}

template <class... A>
struct Autograd {
    static Tensor row_loss(A... a) {
        const RowLossArgs args{a...};
        if (needs_reference(args)) return reference(args);
        if (at::GradMode::is_enabled() && args.logits.requires_grad()) return RowLossFunction::apply(args.logits, args);
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        static const Operator<Tensor> op("fused_losses::row_loss");
        return op(args);
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, Autograd, m) {
    m.impl("row_loss", &WithRowLossArgs<Autograd>::row_loss);
    for (const char* internal : {"row_loss_with_grad", "row_loss_with_stats", "row_loss_backward"})
        m.impl(internal, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fused_losses
