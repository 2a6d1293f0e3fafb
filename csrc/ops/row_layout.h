// Finds two strides per tensor that reach every row: coalesces the row dimensions (all but the class dimension) of the
// logits and of the tensors that go with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <initializer_list>
#include <optional>

#include "core/row_problem.h"

namespace fused_losses {

struct RowLayout {
    static constexpr int kMaxTensors = 6;
    std::int64_t outer = 1, inner = 1;
    std::array<RowStride, kMaxTensors> strides;  // in the order given
};

// A tensor's row dimensions: those of `tensor` without `class_dim` (-1: it has none).
struct RowDims {
    const at::Tensor* tensor;
    std::int64_t class_dim;
};

// Empty if the tensors cannot be walked together with two strides each.
inline std::optional<RowLayout> coalesce_rows(at::IntArrayRef row_sizes, std::initializer_list<RowDims> tensors) {
    RowLayout layout;
    for (const std::int64_t size : row_sizes)
        if (size == 0) return RowLayout{1, 0, {}};  // nothing to reach, whatever the strides
    const auto stride = [](const RowDims& t, std::int64_t dim) {
        return t.tensor->stride(t.class_dim >= 0 && dim >= t.class_dim ? dim + 1 : dim);
    };
    std::int64_t dims = 0;  // coalesced so far; sizes[1] is the innermost
    std::int64_t sizes[2] = {1, 1};
    for (std::int64_t d = static_cast<std::int64_t>(row_sizes.size()) - 1; d >= 0; --d) {
        if (row_sizes[d] == 1) continue;
        std::int64_t RowStride::* const current = dims == 2 ? &RowStride::outer : &RowStride::inner;
        std::int64_t& extent = sizes[dims == 2 ? 0 : 1];
        bool mergeable = dims > 0;
        int i = 0;
        for (const RowDims& t : tensors) mergeable &= stride(t, d) == layout.strides[i++].*current * extent;
        if (mergeable) {
            extent *= row_sizes[d];
            continue;
        }
        if (++dims > 2) return std::nullopt;
        i = 0;
        for (const RowDims& t : tensors)
            layout.strides[i++].*(dims == 2 ? &RowStride::outer : &RowStride::inner) = stride(t, d);
        sizes[dims == 2 ? 0 : 1] = row_sizes[d];
    }
    layout.outer = sizes[0];
    layout.inner = sizes[1];
    return layout;
}

}  // namespace fused_losses
