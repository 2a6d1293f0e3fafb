// What the .cu files offer to backend.cpp. They include no torch header, which keeps nvcc at seconds a file;
// the glue includes no kernel. Every function only enqueues work on `stream` and returns the launch's error
// code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/row_problem.h"

namespace fused_losses::cuda {

// Class indices are 32 bits wide in the kernels (offsets are not); the limit leaves room for loop steps.
constexpr std::int64_t kMaxClasses = std::int64_t(1) << 30;

// Fills row_values, row_weights and stats, as far as they are not null.
cudaError_t enqueue_forward(const RowProblem& p, cudaStream_t stream);

// Fills grad from stats, upstream and denominator.
cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream);

// The same for a loss of PassLosses.
cudaError_t enqueue_pass_forward(const RowProblem& p, cudaStream_t stream);
cudaError_t enqueue_pass_gradient(const RowProblem& p, cudaStream_t stream);

// Doubles of scratch memory that enqueue_reduction wants for this many rows.
std::int64_t reduction_scratch(std::int64_t rows);

// loss = sum of row_values. With row_weights: denominator = their sum and loss is divided by it (0 where that
// is 0). loss and denominator are acc scalars on the device. The order of additions depends on the number of
// rows only.
cudaError_t enqueue_reduction(const RowProblem& p, double* scratch, void* loss, void* denominator, cudaStream_t stream);

}  // namespace fused_losses::cuda
