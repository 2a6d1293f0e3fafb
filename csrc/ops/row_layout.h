// Finds two strides per tensor that reach every row: coalesces the row dimensions (all but the class dimension) of the
// logits and of the tensors that go with them.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "core/row_problem.h"
#include "ops/tensor.h"

namespace fused_losses {

// One of the tensors that are walked together: its row dimensions are those without `class_dim` (-1: it has none).
struct RowTensor {
    Tensor* tensor = nullptr;  // null: absent
    std::int64_t class_dim = -1;
    RowStride stride = {};  // found
    Tensor original = {};   // where `tensor` had to be copied
};

namespace detail {

// Of the tensor, along a dimension of the rows. A single number stands for all of them.
inline std::int64_t stride_along(const RowTensor& t, Sizes rows, std::int64_t dim) {
    if (t.class_dim < 0) return t.tensor->sizes() == rows ? t.tensor->stride(dim) : 0;
    return t.tensor->stride(dim >= t.class_dim ? dim + 1 : dim);
}

}  // namespace detail

struct RowLayout {
    std::int64_t outer = 1, inner = 1;
};

// False if the tensors cannot be walked together with two strides each.
inline bool coalesce_rows(Sizes rows, std::span<RowTensor> tensors, RowLayout& layout) {
    layout = {1, 0};
    for (RowTensor& t : tensors) t.stride = {};
    for (const std::int64_t size : rows)
        if (size == 0) return true;  // nothing to reach, whatever the strides
    std::int64_t dims = 0;           // coalesced so far; sizes[1] is the innermost
    std::int64_t sizes[2] = {1, 1};
    for (std::int64_t d = static_cast<std::int64_t>(rows.size()) - 1; d >= 0; --d) {
        if (rows[d] == 1) continue;
        std::int64_t RowStride::* current = dims == 2 ? &RowStride::outer : &RowStride::inner;
        std::int64_t& extent = sizes[dims == 2 ? 0 : 1];
        const auto stride = [&](const RowTensor& t) { return detail::stride_along(t, rows, d); };
        bool mergeable = dims > 0;
        for (const RowTensor& t : tensors) mergeable &= !t.tensor || stride(t) == t.stride.*current * extent;
        if (mergeable) {
            extent *= rows[d];
            continue;
        }
        if (++dims > 2) return false;
        current = dims == 2 ? &RowStride::outer : &RowStride::inner;
        for (RowTensor& t : tensors)
            if (t.tensor) t.stride.*current = stride(t);
        sizes[dims == 2 ? 0 : 1] = rows[d];
    }
    layout = {sizes[0], sizes[1]};
    return true;
}

// The same for any tensors. Where two strides do not reach every row (a crop of an image, say), it copies tensors that
// are not contiguous, one after the other, until they do: callers put the large ones last.
inline RowLayout lay_out_rows(Sizes rows, std::span<RowTensor> tensors) {
    RowLayout layout;
    for (auto t = tensors.begin(); !coalesce_rows(rows, tensors, layout) && t != tensors.end(); ++t) {
        if (!t->tensor || t->tensor->is_contiguous()) continue;
        t->original = std::move(*t->tensor);
        *t->tensor = contiguous(t->original);
    }
    return layout;
}

}  // namespace fused_losses
