// The CPU's drivers of the Z-Error operators, and of the row loss that one of them takes as scores.
#pragma once

#include "core/row_problem.h"
#include "z_error/problem.h"

namespace fused_losses {

void cpu_class_moments(const ZProblem& p, double* moments);
void cpu_z_error_mask(const ZProblem& p);
void cpu_z_error_loss(const ZProblem& p);
void cpu_z_error_gradient(const ZProblem& p);

void cpu_update_moments(double* running, const double* batch, std::int64_t groups, double momentum, int device);

void cpu_row_loss(RowProblem& p);

}  // namespace fused_losses
