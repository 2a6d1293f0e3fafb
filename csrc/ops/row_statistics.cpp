// Entry of the operator row_statistics, with the checks of row losses.
#include "core/row_statistics.h"
#include "ops/operators.h"
#include "ops/row_loss/checks.h"
#include "ops/row_loss/describe.h"

namespace fused_losses {

RowStatisticsTensors::RowStatisticsTensors(RowProblem& p, DtypeCode acc, Device device) {
    const std::int64_t of_stats[] = {kRowStatistics, p.rows()}, of_argmax[] = {p.rows()};
    stats = empty(of_stats, acc, device);
    argmax = empty(of_argmax, dtypes::int64, device);
    p.row_statistics = stats.mutable_data_ptr();
    p.argmax = static_cast<std::int64_t*>(argmax.mutable_data_ptr());
}

namespace {

void row_statistics(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RowLossArgs args;
    args.loss = "row_statistics";
    in.read(args.logits, args.target, args.constants.ignore_index);
    const RowLossShape shape = check_row_loss(args);
    RowTensor tensors[] = {{&args.target, -1}, {&args.logits, shape.class_dim}};
    const RowLayout layout = lay_out_rows(shape.rows, tensors);
    const Tensor& logits = args.logits;

    RowProblem p = describe_rows(layout, tensors[1], tensors[0]);
    p.ignore_index = args.constants.ignore_index;

    RowStatisticsTensors found(p, acc_of(logits), logits.device());
    if (p.rows() > 0) backend_of(logits.device()).row_statistics(p);
    Results(stack).push(found.stats, found.argmax);
}

}  // namespace

void implement_row_statistics(Library& m) { m.impl("row_statistics", &row_statistics); }

}  // namespace fused_losses
