// The parameters that all row-loss operators share, in schema order.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace fused_losses {

using OptionalTensor = std::optional<at::Tensor>;

struct RowLossArgs {
    const at::Tensor& logits;                 // [C], [N, C] or [N, C, d1, ...]
    const at::Tensor& target;                 // class indices without the class dimension, or probabilities like logits
    const OptionalTensor& weight;             // [C]
    const OptionalTensor& sample_weight;      // one per row: the shape of class indices
    const OptionalTensor& logit_bias_tensor;  // 0-dim; takes the place of logit_bias
    const OptionalTensor& margin;             // [C] or 0-dim; takes the place of params[0] in margin losses
    std::string_view loss;
    at::ArrayRef<double> params;
    double logit_bias;
    std::int64_t ignore_index;
    std::string_view reduction;
};

// F<T1, ..., Tn> for the types above: an operator is a function template over this pack, `RowLossArgs{pack...}` its
// first line, and no signature is written twice.
template <template <class...> class F>
using WithRowLossArgs =
    F<const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, std::string_view, at::ArrayRef<double>, double, std::int64_t, std::string_view>;

}  // namespace fused_losses
