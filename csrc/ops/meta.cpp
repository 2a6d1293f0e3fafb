// Shapes and dtypes without data, symbolic sizes included: what torch.compile, torch.export and the meta device see.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace fused_losses {
namespace {

at::Tensor empty_acc(c10::SymIntArrayRef sizes, const RowLossArgs& args, const RowLossShape& shape) {
    return at::empty_symint(sizes, args.logits.options().dtype(shape.acc).memory_format(at::MemoryFormat::Contiguous));
}

at::Tensor empty_loss(const RowLossArgs& args, const RowLossShape& shape) {
    const bool none = parse_reduction(args) == Reduction::kNone;
    return empty_acc(none ? c10::SymIntArrayRef(shape.rows) : c10::SymIntArrayRef(), args, shape);
}

template <class... A>
struct Meta {
    static at::Tensor row_loss(A... a) {
        const RowLossArgs args{a...};
        find_loss(args);
        return empty_loss(args, check_row_loss(args));
    }

    static std::tuple<at::Tensor, at::Tensor> row_loss_with_grad(A... a) {
        const RowLossArgs args{a...};
        return {row_loss(a...), at::empty_like(args.logits)};
    }

    static std::tuple<at::Tensor, at::Tensor, at::Tensor> row_loss_with_stats(A... a) {
        const RowLossArgs args{a...};
        const int loss = find_loss(args);
        const RowLossShape shape = check_row_loss(args);
        c10::SymInt rows = 1;
        for (const auto& size : shape.rows) rows = rows * size;
        const int count = stats_count_of(loss, spread_of(loss, args.params.data(), shape.soft_target));
        const Reduction reduction = parse_reduction(args);
        const bool mean = reduction == Reduction::kMean || reduction == Reduction::kActiveMean;
        return {empty_loss(args, shape), empty_acc({count, rows}, args, shape),
                mean ? empty_acc({}, args, shape) : empty_acc({0}, args, shape)};
    }

    static at::Tensor row_loss_backward(const at::Tensor&, const at::Tensor&, const at::Tensor&, A... a) {
        const RowLossArgs args{a...};
        return at::empty_like(args.logits);
    }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, Meta, m) {
    using Ops = WithRowLossArgs<Meta>;
    m.impl("row_loss", &Ops::row_loss);
    m.impl("row_loss_with_grad", &Ops::row_loss_with_grad);
    m.impl("row_loss_with_stats", &Ops::row_loss_with_stats);
    m.impl("row_loss_backward", &Ops::row_loss_backward);
}

}  // namespace fused_losses
