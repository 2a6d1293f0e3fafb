// The parameters of the Z-Error operators. Each operator has some of them.
#pragma once

#include "ops/stack.h"

namespace fused_losses {

struct ZErrorArgs {
    Tensor input;              // scores or logits of classes ("score" in schemas), logits of labels, or predictions
    Tensor target;             // classes, labels or numbers
    OptionalTensor values;     // the rows' losses, if they are not to be computed
    std::int64_t num_classes;  // or other groups
    std::int64_t ignore_index;
    OptionalTensor sample_weight;  // one per row
    OptionalTensor weight;         // of classes
    OptionalTensor pos_weight;     // binary: one, or one per task
    std::string statistic, reduction;
    bool unweighted;  // values are without the class weights

    // When is a row unlikely?
    OptionalTensor moments;           // float64 [3, groups]; absent: those of the rows at hand
    OptionalTensor threshold_tensor;  // takes the place of threshold
    Numbers threshold;                // one, or (binary) one per label
    std::string tail;
    std::int64_t min_count;
    bool keep_small, with_scores = false;

    // Scores that are cross entropies
    double label_smoothing = 0, logit_bias = 0;
    OptionalTensor logit_bias_tensor;  // takes the place of logit_bias

    // Backward
    Tensor denominator, mask;
    OptionalTensor grad_loss;
};

}  // namespace fused_losses
