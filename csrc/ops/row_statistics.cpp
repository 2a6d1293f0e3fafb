// Entry of the operator row_statistics, with the checks of row losses.
#include "core/row_statistics.h"
#include "ops/operators.h"
#include "ops/row_layout.h"
#include "ops/row_loss/checks.h"

namespace fused_losses {

RowStatisticsTensors::RowStatisticsTensors(RowProblem& p, DtypeCode acc, Device device) {
    const std::int64_t of_stats[] = {kRowStatistics, p.rows()}, of_argmax[] = {p.rows()};
    stats = empty(of_stats, acc, device);
    argmax = empty(of_argmax, dtypes::int64, device);
    p.row_statistics = stats.mutable_data_ptr();
    p.argmax = static_cast<std::int64_t*>(argmax.mutable_data_ptr());
}

void row_statistics(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RowLossArgs args;
    args.loss = "row_statistics";
    in.read(args.logits, args.target, args.constants.ignore_index);
    const RowLossShape shape = check_row_loss(args);
    RowTensor tensors[] = {{&args.target, -1}, {&args.logits, shape.class_dim}};
    const RowLayout layout = lay_out_rows(shape.rows, tensors);
    const Tensor& logits = args.logits;

    RowProblem p;
    p.dtype = dtype_of(*element_type(logits)), p.index_type = index_type_of(*element_type(args.target));
    p.device = logits.device().index;
    p.outer = layout.outer, p.inner = layout.inner, p.num_classes = logits.size(shape.class_dim);
    p.target = args.target.const_data_ptr(), p.target_stride = tensors[0].stride;
    p.logits = logits.const_data_ptr(), p.logits_stride = tensors[1].stride;
    p.logits_class_stride = logits.stride(shape.class_dim);
    p.ignore_index = args.constants.ignore_index;

    RowStatisticsTensors found(p, acc_of(logits), logits.device());
    if (p.rows() > 0) backend_of(logits.device()).row_statistics(p);
    Results(stack).push(found.stats, found.argmax);
}

}  // namespace fused_losses
