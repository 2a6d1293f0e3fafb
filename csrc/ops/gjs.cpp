// Entry of the operator gjs_rows_.
#include "losses/gjs.h"

#include "ops/operators.h"
#include "ops/row_loss/checks.h"
#include "ops/row_loss/describe.h"

namespace fused_losses {

namespace {

void gjs_rows_(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    std::vector<Tensor> views, grads;
    RowLossArgs args;
    args.loss = "gjs";
    Numbers weights;
    in.read(views, args.target, weights, grads);
    const std::size_t count = views.size();
    check_value(
        count >= 1 && count <= kMostViews && (grads.empty() || grads.size() == count) && weights.count == count + 1,
        "gjs: there must be 1 to ", kMostViews, " views, a gradient for each or none, and one weight more, got ", count,
        ", ", grads.size(), " and ", weights.count);
    args.logits = std::move(views[0]);
    const Tensor& first = args.logits;
    check_logits(args);
    check(acc_of(first) == first.dtype(), "gjs: views must be float32 or float64, got ", first.dtype());
    const Shape rows = without_class_dim(first);
    check_target(args, {}, rows);
    const std::int64_t class_dim = class_dim_of(first);
    std::vector<RowTensor> tensors(1 + 2 * count);
    tensors[0] = {&args.target, -1};
    for (std::size_t i = 0; i < count; ++i) {
        Tensor& view = i == 0 ? args.logits : views[i];
        Tensor* const grad = grads.empty() ? nullptr : &grads[i];
        for (const Tensor* t : {static_cast<const Tensor*>(&view), static_cast<const Tensor*>(grad)})
            check(!t || (t->sizes() == first.sizes() && t->dtype() == first.dtype() && t->device() == first.device()),
                  "gjs: views and gradients must be alike");
        check(!grad || grad->is_contiguous(),
              "gjs: gradients must be contiguous");  // so that no copy takes their place
        tensors[1 + 2 * i] = {&view, class_dim}, tensors[2 + 2 * i] = {grad, class_dim};
    }
    const RowLayout layout = lay_out_rows(rows, tensors);

    RowProblem p = describe_rows(layout, tensors[1], tensors[0]);
    const std::int64_t of_values[] = {p.rows()};
    Tensor values = empty(of_values, first.dtype(), first.device());
    p.row_values = values.mutable_data_ptr();
    GjsViews all;
    all.count = static_cast<int>(count), all.label_weight = weights.values[0];
    for (std::size_t i = 0; i < count; ++i) {
        const RowTensor &view = tensors[1 + 2 * i], &grad = tensors[2 + 2 * i];
        GjsView& of = all.views[i];
        of.weight = weights.values[i + 1];
        of.logits = view.tensor->const_data_ptr(), of.logits_stride = view.stride;
        of.logits_class_stride = view.tensor->stride(class_dim);
        if (!grad.tensor) continue;
        of.grad = grad.tensor->mutable_data_ptr(), of.grad_stride = grad.stride;
        of.grad_class_stride = grad.tensor->stride(class_dim);
    }
    if (p.rows() > 0) backend_of(first.device()).gjs(p, all);
    Results(stack).push(values);
}

}  // namespace

void implement_gjs(Library& m) { m.impl("gjs_rows_", &gjs_rows_); }

}  // namespace fused_losses
