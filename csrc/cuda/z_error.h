// The Z-Error drivers of CUDA, in z_error.cpp, and what z_error.cu offers to them: functions that only enqueue one
// kernel on `stream` and return the launch's error code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "z_error/problem.h"

namespace fused_losses::cuda {

void class_moments(const ZProblem& p, double* moments);
void z_error_mask(const ZProblem& p);
void z_error_loss(const ZProblem& p);
void z_error_gradient(const ZProblem& p);
void update_moments(double* running, const double* batch, std::int64_t groups, double momentum, int device);

// How a reduction is shared by blocks: a function of the problem's size alone, so that results do not depend on the
// device. Blocks leave partial results in `partials`; the one that finishes last, which it learns from a ticket,
// combines them in order. A single block needs neither.
struct WorkShares {
    std::int64_t ranges = 1;  // of groups, each with its own ticket
    std::int64_t chunks = 1;  // of rows
    std::int64_t chunk_rows = 0;
    std::int64_t numbers_per_chunk = 0;
    double* partials = nullptr;   // partial_count() of them
    unsigned* tickets = nullptr;  // ticket_count() zeros

    FL_HD std::int64_t count() const { return ranges * chunks; }
    std::int64_t partial_count() const { return chunks > 1 ? chunks * numbers_per_chunk : 0; }
    std::int64_t ticket_count() const { return chunks > 1 ? ranges : 0; }
};

// So many counters of a stream's own: first kLossBarriers of a grid_group, then zeros that are zeros again after every
// launch. `number`: as own_ticket in launch.h.
constexpr int kOwnCounters = 16;
cudaError_t find_own_counters(int number, unsigned*& counters);

WorkShares shares_of_moments(const ZProblem& p);
WorkShares shares_of_loss(const ZProblem& p);

cudaError_t enqueue_class_moments(const ZProblem& p, const WorkShares& shares, double* moments, cudaStream_t stream);
// counters: so many zeros, which are zeros again afterwards.
constexpr int kMaskCounters = 2;
cudaError_t enqueue_z_error_mask(const ZProblem& p, unsigned* counters, cudaStream_t stream);
// Scores first where p.entropy has logits, then `moments` where p.own_moments is not null. barriers: kLossBarriers
// counters of a grid_group unless it runs in one block.
constexpr int kLossBarriers = 1;
// Blocks that it is launched with, or fewer, if more than one.
std::int64_t blocks_of_loss(const ZProblem& p, const WorkShares& moments, const WorkShares& loss);
cudaError_t enqueue_z_error_loss(const ZProblem& p, const WorkShares& moments, const WorkShares& loss,
                                 unsigned* barriers, cudaStream_t stream);
cudaError_t enqueue_z_error_gradient(const ZProblem& p, cudaStream_t stream);
cudaError_t enqueue_update_moments(double* running, const double* batch, std::int64_t groups, double momentum,
                                   cudaStream_t stream);

}  // namespace fused_losses::cuda
