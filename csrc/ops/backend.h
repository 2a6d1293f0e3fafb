// What a device provides. Arguments are checked and outputs allocated before any of it is called.
#pragma once

#include "core/elr_memory.h"
#include "core/row_problem.h"
#include "losses/gjs.h"
#include "losses/rescale.h"
#include "z_error/problem.h"

namespace fused_losses {

struct Backend {
    // ---- Row losses ----
    // Fills what is asked for: `loss` (acc, one; with Reduction::kNone it is p.row_values and nothing is left to do),
    // `denominator` (acc, one: the sum of the rows' weights; null if nobody wants it), p.stats, p.grad. On the CPU the
    // gradient includes p.upstream, the loss may be null, and p.row_statistics and p.argmax may be asked for.
    void (*row_loss)(RowProblem& p, void* loss, void* denominator);
    // Fills p.grad from p.stats, p.upstream and p.denominator.
    void (*row_loss_gradient)(const RowProblem& p);
    // Whether the gradient takes no stats but recomputes them from the logits.
    bool (*backward_recomputes)(const RowProblem& p);
    // How many words of 32 bits per row a forward with stats leaves in p.bits, from which alone and stats the gradient
    // follows: most often none.
    std::int64_t (*words_of_bits)(const RowProblem& p);
    // Fills p.row_statistics and p.argmax.
    void (*row_statistics)(const RowProblem& p);
    // A step of early-learning regularisation: fills p.row_values and, where there is one, p.grad (acc).
    void (*elr)(const RowProblem& p, const ElrMemory& m);
    // Fills p.grad and, forward, norms.
    void (*rescale)(const RowProblem& p, const LogitRescale& of);
    // Fills p.row_values and the views' gradients.
    void (*gjs)(const RowProblem& p, const GjsViews& views);

    // ---- Z-Error ----
    // moments: double [3][num_groups], count, mean, m2; zeros for a group without rows.
    void (*class_moments)(const ZProblem& p, double* moments);
    // Fills mask and, where not null, scores and kept_target.
    void (*z_error_mask)(const ZProblem& p);
    // The same and the loss: row_values, or loss and denominator.
    void (*z_error_loss)(const ZProblem& p);
    // Fills grad.
    void (*z_error_gradient)(const ZProblem& p);
    // Merges a batch's moments into running ones (z_error/moments.h).
    void (*update_moments)(double* running, const double* batch, std::int64_t groups, double momentum, int device);
};

extern const Backend cpu_backend;
extern const Backend cuda_backend;  // defined in builds with CUDA

}  // namespace fused_losses
