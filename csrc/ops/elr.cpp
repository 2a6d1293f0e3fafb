// Entry of the operator elr_rows_, with the checks of row losses.
#include "ops/operators.h"
#include "ops/row_loss/checks.h"
#include "ops/row_loss/describe.h"

namespace fused_losses {
namespace {

// One entry per row, in the order of row numbers.
const void* of_rows(const char* name, const Tensor& t, DtypeCode dtype, const Tensor& logits, std::int64_t rows) {
    check(t.dtype() == dtype && t.device() == logits.device() && t.numel() == rows && t.is_contiguous(),
          "ELRLoss: ", name, " must hold ", rows, " contiguous numbers of ", dtype, " on ", logits.device(),
          ", got shape ", t.sizes(), " of ", t.dtype(), " on ", t.device());
    return t.const_data_ptr();
}

void check_memory(const Tensor& memory, const Tensor& logits, std::int64_t classes) {
    const bool has_shape = memory.dim() == 2 && memory.size(1) == classes && memory.is_contiguous();
    check(has_shape && (memory.dtype() == dtypes::float32 || memory.dtype() == dtypes::bfloat16),
          "ELRLoss: memory must ", "be contiguous, float32 or bfloat16, of shape [samples, ", classes, "], got ",
          memory.dtype(), " of shape ", memory.sizes());
    check_same_device("memory", memory, logits);
}

void elr_rows_(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RowLossArgs args;
    args.loss = "ELRLoss";
    Tensor place, memory;
    OptionalTensor order, parameters, scale;
    ElrMemory m;
    bool with_grad = false;
    in.read(args.logits, args.target, place, order, memory, parameters, scale, m.beta, m.lam,
            args.constants.ignore_index, m.updates, with_grad);
    const RowLossShape shape = check_row_loss(args);
    const Tensor& logits = args.logits;
    const DtypeCode acc = acc_of(logits);
    Tensor grad;
    if (with_grad) grad = empty(logits.sizes(), acc, logits.device());
    RowTensor tensors[] = {
        {&args.target, -1}, {&args.logits, shape.class_dim}, {with_grad ? &grad : nullptr, shape.class_dim}};
    const RowLayout layout = lay_out_rows(shape.rows, tensors);

    RowProblem p = describe_rows(layout, tensors[1], tensors[0]);
    p.ignore_index = args.constants.ignore_index;
    const std::int64_t of_values[] = {p.rows()}, nothing[] = {0};
    Tensor values = empty(of_values, acc, logits.device());
    p.row_values = values.mutable_data_ptr();
    if (with_grad) {
        p.grad = grad.mutable_data_ptr(), p.grad_stride = tensors[2].stride;
        p.grad_class_stride = grad.stride(shape.class_dim);
    } else {
        grad = empty(nothing, acc, logits.device());
    }

    check_memory(memory, logits, p.num_classes);
    m.rows = memory.mutable_data_ptr(), m.is_bfloat16 = memory.dtype() == dtypes::bfloat16;
    m.place = static_cast<const std::int64_t*>(of_rows("place", place, dtypes::int64, logits, p.rows()));
    if (order) m.order = static_cast<const std::int64_t*>(of_rows("order", *order, dtypes::int64, logits, p.rows()));
    if (scale) m.scale = of_rows("scale", *scale, acc, logits, p.rows());
    if (parameters) m.parameters = of_rows("parameters", *parameters, acc, logits, 2);
    const auto check_numbers = [&](const char* name, const std::int64_t* numbers, std::int64_t end) {
        for (std::int64_t i = 0; numbers && i < p.rows() && logits.is_cpu(); ++i)
            check_index(numbers[i] >= 0 && numbers[i] < end, "ELRLoss: ", name, " must be in [0, ", end, "), got ",
                        numbers[i]);
    };
    check_numbers("place", m.place, memory.size(0));
    check_numbers("order", m.order, p.rows());
    if (p.rows() > 0) backend_of(logits.device()).elr(p, m);
    Results(stack).push(values, grad);
}

}  // namespace

void implement_elr(Library& m) { m.impl("elr_rows_", &elr_rows_); }

}  // namespace fused_losses
