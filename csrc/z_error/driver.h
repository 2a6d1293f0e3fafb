// What a device provides for the Z-Error operators. Arguments are checked and outputs allocated before.
#pragma once

#include "z_error/problem.h"

namespace fused_losses {

struct ZErrorDriver {
    // moments: double [3][num_groups], count, mean, m2; zeros for a group without rows.
    void (*moments)(const ZProblem& p, double* moments);
    // Fills mask and, where not null, scores and kept_target.
    void (*mask)(const ZProblem& p);
    // The same and the loss: row_values, or loss and denominator.
    void (*loss)(const ZProblem& p);
    // Fills grad.
    void (*gradient)(const ZProblem& p);
    // Whether `loss` computes ZProblem::entropy.
    bool has_entropy;
};

ZErrorDriver cpu_z_error();
ZErrorDriver cuda_z_error();  // defined in builds with CUDA

}  // namespace fused_losses
