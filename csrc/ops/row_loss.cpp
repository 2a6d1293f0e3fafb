// CPU and CUDA entry of the row-loss operators: checks, allocates, describes the call as a RowProblem, hands it to the
// device's backend. Nothing here differs between devices.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/row_layout.h"

namespace fused_losses {
namespace {

Dtype dtype_of(const at::Tensor& t) {
    switch (t.scalar_type()) {
        case at::kDouble: return Dtype::kFloat64;
        case at::kHalf: return Dtype::kFloat16;
        case at::kBFloat16: return Dtype::kBFloat16;
        default: return Dtype::kFloat32;
    }
}

IndexType index_type_of(const at::Tensor& t) {
    switch (t.scalar_type()) {
        case at::kInt: return IndexType::kInt32;
        case at::kShort: return IndexType::kInt16;
        case at::kByte: return IndexType::kUInt8;
        default: return IndexType::kInt64;
    }
}

// A RowProblem together with the tensors that keep its memory alive.
class RowLossCall {
public:
    // given_grad: the gradient of an earlier call for the same rows.
    RowLossCall(const RowLossArgs& arguments, bool with_grad, const at::Tensor* grad_loss = nullptr,
                const at::Tensor* given_grad = nullptr)
        : args(arguments), shape(check_row_loss(arguments)), sizes(C10_AS_INTARRAYREF_SLOW(shape.rows)) {
        describe_loss();
        logits = args.logits;
        target = args.target;
        if (shape.soft_target && target.scalar_type() != logits.scalar_type()) target = target.to(shape.acc);
        if (args.sample_weight) sample_weight = args.sample_weight->to(shape.acc);
        if (grad_loss) upstream = grad_loss->to(shape.acc).expand(sizes);
        if (with_grad) grad = given_grad ? *given_grad : at::empty_like(logits);
        if (!lay_out()) make_contiguous();
        point();
        problem.grad_is_written = given_grad && grad.is_same(*given_grad);
    }

    at::Tensor empty(at::IntArrayRef size) const { return at::empty(size, args.logits.options().dtype(shape.acc)); }

    // Allocates the loss; under "none" the rows' values are the loss.
    at::Tensor new_loss() {
        if (problem.reduction != Reduction::kNone) return empty({});
        at::Tensor loss = empty(sizes);
        problem.row_values = loss.mutable_data_ptr();
        return loss;
    }

    // Empty unless the mean divides by it.
    at::Tensor new_denominator() const { return divides() ? empty({}) : at::Tensor(); }

    // Whether the loss is a quotient.
    bool divides() const {
        return problem.reduction == Reduction::kMean || problem.reduction == Reduction::kActiveMean;
    }

    at::Tensor new_stats() {
        at::Tensor stats = empty({problem.stats_count, problem.rows()});
        problem.stats = stats.mutable_data_ptr();
        return stats;
    }

    // The gradient in the layout of the caller's logits.
    at::Tensor finished_grad() const {
        if (logits.is_same(args.logits)) return grad;
        return at::empty_like(args.logits).copy_(grad);
    }

    RowProblem problem;

private:
    void describe_loss() {
        problem.loss = find_loss(args);
        problem.reduction = parse_reduction(args);
        // Rounded first of all: every choice that depends on a parameter is made by the number that is computed with.
        const bool is_float = shape.acc == at::kFloat;
        for (std::size_t i = 0; i < args.params.size(); ++i)
            problem.params[i] = is_float ? static_cast<float>(args.params[i]) : args.params[i];
        problem.spread = spread_of(problem.loss, problem.params, shape.soft_target);
        problem.stats_count = stats_count_of(problem.loss, problem.spread);
        problem.ignore_index = args.ignore_index;
        problem.logit_bias = args.logit_bias;
        if (!args.logit_bias_tensor) return;
        if (args.logits.is_cpu() || !args.logit_bias_tensor->is_cpu()) {
            logit_bias = args.logit_bias_tensor->to(shape.acc);
            problem.logit_bias_device = logit_bias.const_data_ptr();
        } else {
            problem.logit_bias = args.logit_bias_tensor->item<double>();  // on the CPU already: no synchronisation
        }
    }

    // Strides are taken of defined tensors; logits stand in for absent ones.
    bool lay_out() {
        const RowDims of_logits{&logits, shape.class_dim};
        const auto optional = [&](const at::Tensor& t, std::int64_t class_dim) {
            return t.defined() ? RowDims{&t, class_dim} : of_logits;
        };
        const auto layout = coalesce_rows(
            sizes, {of_logits, optional(target, shape.soft_target ? shape.class_dim : -1), optional(sample_weight, -1),
                    optional(grad, shape.class_dim), optional(upstream, -1)});
        if (!layout) return false;
        problem.outer = layout->outer;
        problem.inner = layout->inner;
        problem.logits_stride = layout->strides[0];
        (shape.soft_target ? problem.soft_target_stride : problem.target_stride) = layout->strides[1];
        problem.sample_weight_stride = layout->strides[2];
        problem.grad_stride = layout->strides[3];
        problem.upstream_stride = layout->strides[4];
        return true;
    }

    // Rows that need more than two strides (a crop of an image, say). The small tensors are copied first; the logits
    // only if that does not help.
    void make_contiguous() {
        target = target.contiguous();
        if (sample_weight.defined()) sample_weight = sample_weight.contiguous();
        if (upstream.defined()) upstream = upstream.contiguous();
        if (lay_out()) return;
        logits = logits.contiguous();
        if (grad.defined()) grad = at::empty_like(logits);
        TORCH_INTERNAL_ASSERT(lay_out());
    }

    void point() {
        const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
        problem.device = logits.device().index();
        problem.dtype = dtype_of(logits);
        problem.num_classes = logits.size(shape.class_dim);
        problem.logits = pointer(logits);
        problem.logits_class_stride = logits.stride(shape.class_dim);
        if (shape.soft_target) {
            problem.soft_target = pointer(target);
            problem.soft_target_is_stored = target.scalar_type() == logits.scalar_type();
            problem.soft_target_class_stride = target.stride(shape.class_dim);
        } else {
            problem.target = pointer(target);
            problem.index_type = index_type_of(target);
        }
        if (args.weight) class_weight = args.weight->to(shape.acc).contiguous();
        problem.class_weight = pointer(class_weight);
        if (args.margin) margin = args.margin->to(shape.acc).contiguous();
        problem.margin = pointer(margin);
        problem.margin_stride = margin.defined() && margin.dim() == 1 ? 1 : 0;
        problem.sample_weight = pointer(sample_weight);
        problem.upstream = pointer(upstream);
        if (!grad.defined()) return;
        problem.grad = grad.mutable_data_ptr();
        problem.grad_class_stride = grad.stride(shape.class_dim);
    }

    const RowLossArgs& args;
    const RowLossShape shape;
    const c10::DimVector sizes;
    at::Tensor logits, target, class_weight, sample_weight, logit_bias, margin, upstream, grad;
};

template <Backend (*backend)()>
struct OnDevice {
    template <class... A>
    struct Ops {
        static at::Tensor row_loss(A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/false);
            const at::Tensor loss = call.new_loss();
            backend().forward(call.problem, loss, /*denominator=*/{});
            return loss;
        }

        static std::tuple<at::Tensor, at::Tensor> row_loss_with_grad(A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/true);
            const at::Tensor loss = call.new_loss();
            backend().forward(call.problem, loss, /*denominator=*/{});
            return {loss, call.finished_grad()};
        }

        static std::tuple<at::Tensor, at::Tensor, at::Tensor> row_loss_with_stats(A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/false);
            const at::Tensor loss = call.new_loss(), stats = call.new_stats(), denominator = call.new_denominator();
            backend().forward(call.problem, loss, denominator);
            return {loss, stats, denominator.defined() ? denominator : call.empty({0})};
        }

        static at::Tensor row_loss_backward(const at::Tensor& grad_loss, const at::Tensor& stats,
                                            const at::Tensor& denominator, A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/true, &grad_loss);
            call.problem.stats = const_cast<void*>(stats.const_data_ptr());
            if (call.divides() && denominator.numel() > 0) call.problem.denominator = denominator.const_data_ptr();
            if (!call.problem.stats && call.problem.rows() > 0)
                backend().forward(call.problem, {}, {});  // it kept nothing (CPU) and is run again
            else
                backend().gradient(call.problem);
            return call.finished_grad();
        }

        static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> row_loss_with_stats_and_grad(A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/true);
            const at::Tensor loss = call.new_loss(), stats = call.new_stats(), denominator = call.new_denominator();
            backend().forward(call.problem, loss, denominator);
            return {loss, stats, denominator.defined() ? denominator : call.empty({0}), call.finished_grad()};
        }

        static void row_loss_backward_(const at::Tensor& grad_loss, const at::Tensor& stats,
                                       const at::Tensor& denominator, const at::Tensor& grad_logits, A... a) {
            const RowLossArgs args{a...};
            RowLossCall call(args, /*with_grad=*/true, &grad_loss, &grad_logits);
            call.problem.stats = const_cast<void*>(stats.const_data_ptr());
            if (call.divides()) call.problem.denominator = denominator.const_data_ptr();
            backend().gradient(call.problem);
            if (!call.problem.grad_is_written) grad_logits.copy_(call.finished_grad());
        }
    };
};

template <class Ops>
void implement(torch::Library& m) {
    m.impl("row_loss", &Ops::row_loss);
    m.impl("row_loss_with_grad", &Ops::row_loss_with_grad);
    m.impl("row_loss_with_stats", &Ops::row_loss_with_stats);
    m.impl("row_loss_backward", &Ops::row_loss_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { implement<WithRowLossArgs<OnDevice<cpu_backend>::Ops>>(m); }

#ifdef FL_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
    using Ops = WithRowLossArgs<OnDevice<cuda_backend>::Ops>;
    implement<Ops>(m);
    m.impl("row_loss_with_stats_and_grad", &Ops::row_loss_with_stats_and_grad);
    m.impl("row_loss_backward_", &Ops::row_loss_backward_);
}
#endif

}  // namespace fused_losses
