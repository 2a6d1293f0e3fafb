// The parameters that all row-loss operators share.
#pragma once

#include "ops/stack.h"

namespace fused_losses {

struct RowLossArgs {
    Tensor logits;                     // [C], [N, C] or [N, C, d1, ...]
    Tensor target;                     // class indices without the class dimension, or probabilities like logits
    OptionalTensor weight;             // [C]
    OptionalTensor sample_weight;      // one per row: the shape of class indices
    OptionalTensor logit_bias_tensor;  // 0-dim; takes the place of logit_bias
    OptionalTensor first_param;        // takes the place of params[0]: 0-dim, of margin losses also [C]
    std::string loss;
    Numbers params;
    double logit_bias = 0;
    std::int64_t ignore_index = -100;
    std::string reduction;

    RowLossArgs() = default;
    explicit RowLossArgs(Arguments& in) {
        in.read(logits, target, weight, sample_weight, logit_bias_tensor, first_param, loss, params, logit_bias,
                ignore_index, reduction);
    }
};

// A second label for every row.
struct OtherLabel {
    OptionalTensor target;    // as the first one's
    OptionalTensor share;     // of the first label, one per row; takes the place of share_of_all
    double share_of_all = 1;  // the second one's is the rest

    OtherLabel() = default;
    explicit OtherLabel(Arguments& in) { in.read(Given{target}, share, share_of_all); }
};

}  // namespace fused_losses
