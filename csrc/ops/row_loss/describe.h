// The rows of some logits as a RowProblem, for operators that are no row loss.
#pragma once

#include "core/row_problem.h"
#include "ops/row_layout.h"

namespace fused_losses {

// target: class indices, or none.
inline RowProblem describe_rows(const RowLayout& layout, const RowTensor& logits, const RowTensor& target) {
    const Tensor& z = *logits.tensor;
    RowProblem p;
    p.dtype = dtype_of(*element_type(z));
    p.device = z.device().index;
    p.outer = layout.outer, p.inner = layout.inner, p.num_classes = z.size(logits.class_dim);
    p.logits = z.const_data_ptr(), p.logits_stride = logits.stride;
    p.logits_class_stride = z.stride(logits.class_dim);
    if (!target.tensor) return p;
    p.index_type = index_type_of(*element_type(*target.tensor));
    p.target = target.tensor->const_data_ptr(), p.target_stride = target.stride;
    return p;
}

}  // namespace fused_losses
