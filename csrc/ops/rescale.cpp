// Entries of the operators rescale_logits and rescale_logits_backward, with the checks of row losses.
#include "ops/operators.h"
#include "ops/row_loss/checks.h"
#include "ops/row_loss/describe.h"

namespace fused_losses {
namespace {

struct RescaleArgs {
    Tensor logits, norms, upstream;
    OptionalTensor target, on_device;
    std::int64_t ignore_index = -100;
    LogitRescale of;
};

// Describes the call and runs it. Returns what it writes.
Tensor rescaled(RescaleArgs& a) {
    const bool backward = a.upstream.defined();
    RowLossArgs args;
    args.loss = "rescale_logits";
    args.logits = std::move(a.logits);
    check_logits(args);
    const Tensor& logits = args.logits;
    const DtypeCode acc = acc_of(logits);
    const std::int64_t class_dim = class_dim_of(logits);
    const Shape shape = without_class_dim(logits);
    if (a.target) {
        args.target = std::move(*a.target);
        check_target(args, {}, shape);
    }
    Tensor out = backward || logits.dtype() == acc ? empty_like(logits) : empty(logits.sizes(), acc, logits.device());
    if (backward) {
        check(a.upstream.sizes() == logits.sizes() && a.upstream.device() == logits.device(),
              "rescale_logits: grad must be like the logits, got shape ", a.upstream.sizes());
        convert(a.upstream, acc);
    }
    RowTensor tensors[] = {{args.target.defined() ? &args.target : nullptr, -1},
                           {backward ? &a.upstream : nullptr, class_dim},
                           {&args.logits, class_dim},
                           {&out, class_dim}};
    const RowLayout layout = lay_out_rows(shape, tensors);

    RowProblem p = describe_rows(layout, tensors[2], tensors[0]);
    p.ignore_index = a.ignore_index;
    p.grad = out.mutable_data_ptr(), p.grad_stride = tensors[3].stride, p.grad_class_stride = out.stride(class_dim);

    if (a.on_device) {
        check_same_device("parameter", *a.on_device, logits);
        check(a.on_device->dim() == 0 && a.on_device->is_floating(),
              "rescale_logits: on_device must be a 0-dim floating point tensor, got ", a.on_device->dtype(),
              " of shape ", a.on_device->sizes());
        convert(*a.on_device, acc);
        a.of.on_device = a.on_device->const_data_ptr();
    }
    if (!backward) {
        const std::int64_t of_norms[] = {p.rows()};
        a.norms = empty(of_norms, acc, logits.device());
    } else {
        a.of.upstream = a.upstream.const_data_ptr(), a.of.upstream_stride = tensors[1].stride;
        a.of.upstream_class_stride = a.upstream.stride(class_dim);
        check(a.norms.numel() == p.rows() && a.norms.dtype() == acc && a.norms.device() == logits.device() &&
                  a.norms.is_contiguous(),
              "rescale_logits: norms must be what forward made");
    }
    a.of.norms = a.norms.mutable_data_ptr();
    if (p.rows() > 0) backend_of(logits.device()).rescale(p, a.of);
    if (!tensors[3].original.defined()) return out;
    copy_into(tensors[3].original, out);
    return std::move(tensors[3].original);
}

void rescale_logits(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RescaleArgs a;
    in.read(a.logits, a.target, a.on_device, a.of.parameter, a.of.clips, a.ignore_index);
    Tensor out = rescaled(a);
    Results(stack).push(out, a.norms);
}

void rescale_logits_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RescaleArgs a;
    in.read(a.upstream, a.norms, a.logits, a.target, a.on_device, a.of.parameter, a.of.clips, a.ignore_index);
    Tensor out = rescaled(a);
    Results(stack).push(out);
}

}  // namespace

void implement_rescaling(Library& m) {
    m.impl("rescale_logits", &rescale_logits);
    m.impl("rescale_logits_backward", &rescale_logits_backward);
}

}  // namespace fused_losses
