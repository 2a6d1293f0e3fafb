// What the .cu files offer to backend.cpp. They include no torch header, which keeps nvcc at seconds a file;
// the glue includes no kernel. Every function only enqueues work on `stream` and returns the launch's error
// code.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/elr_memory.h"
#include "core/row_problem.h"
#include "losses/gjs.h"
#include "losses/rescale.h"

namespace fused_losses::cuda {

// Class indices are 32 bits wide in the kernels (offsets are not); the limit leaves room for loop steps.
constexpr std::int64_t kMaxClasses = std::int64_t(1) << 30;

constexpr int kMostThreads = 768;  // of any block: leaves 80 registers each
constexpr int kMaxCluster = 16;    // blocks

// The largest grid; kernels loop over what exceeds it.
constexpr unsigned kMaxBlocks = 4096;
constexpr std::int64_t kPartials = 2 * std::int64_t(kMaxBlocks);

// Kernels come with so many tickets (grid.cuh) that are zero between launches: memory of their own, since what torch's
// allocator gives must not be kept beyond a call. (The first call may be part of what a graph's memory pool is for.)
constexpr int kTickets = 1024;

// Where forward leaves its sums over all rows. The order of additions depends on the problem's size and, where blocks
// hold rows in shared memory, on how many of them the device runs at the same time.
struct LossOutput {
    void* loss = nullptr;         // acc; null: no sums are wanted
    void* denominator = nullptr;  // acc; null: not wanted
    double* partials = nullptr;   // kPartials of scratch memory
    unsigned* ticket = nullptr;   // a zero, before and after; null: one of the kernel's own
    int own_ticket = 0;           // which: launches that may run at the same time take different ones
    // The launch before is enqueue_denominators(), so that kernels that say when they need it may begin beside it.
    bool follows_weights = false;
};

// Fills row_values, stats, grad (for an upstream gradient of 1) and `out`, as far as they are not null. And what
// enqueue_labels() does.
cudaError_t enqueue_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream);

// Forward writes the gradient of a mean before it knows the sum of weights. What it divides by: the number of rows,
// where it may well be right (backward puts a wrong gradient right), or 0 for the sum of weights, counted first.
double assumed_denominator(const RowProblem& p);

// out.denominator = the sum of the weights of all rows, from the targets alone; of two labels [2], what the losses of
// either are divided by.
cudaError_t enqueue_denominators(const RowProblem& p, const LossOutput& out, cudaStream_t stream);

// Whether backward recomputes what forward knows of a row, for which there are no stats then. It takes forward's
// kernel, so that a gradient which forward has written for the right upstream gradient is the same to the bit.
bool backward_recomputes(const RowProblem& p);

// kBackward: from stats.
enum class Direction { kForward, kBackward, kBackwardRecompute };

// Fills grad from stats (null: recomputed), upstream and denominator, unless forward has already written just that.
cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream);

// The same for a multi-reduction loss.
cudaError_t enqueue_multi_reduction_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream);
cudaError_t enqueue_multi_reduction_gradient(const RowProblem& p, cudaStream_t stream);

// How many words per row RowProblem::bits have; 0: rows are of a kind that leaves none.
std::int64_t words_of_bits(const RowProblem& p);

// Of a softmax loss: whether more is asked than the loss of one label, and what does it. Fills row_values, grad, for
// any upstream gradient (unless forward has already written just that), row_statistics, argmax and `out`, but no stats.
bool is_about_labels(const RowProblem& p);
cudaError_t enqueue_labels(const RowProblem& p, const LossOutput& out, cudaStream_t stream);

// Fills row_statistics and argmax; there is a row.
cudaError_t enqueue_row_statistics(const RowProblem& p, cudaStream_t stream);

// Fills row_values, grad and the memory as elr_rows_ (ops.cpp) says; there is a row.
cudaError_t enqueue_elr(const RowProblem& p, const ElrMemory& m, cudaStream_t stream);

// Fills grad and norms as losses/rescale.h says; there is a row.
cudaError_t enqueue_rescale(const RowProblem& p, const LogitRescale& of, cudaStream_t stream);

// Fills row_values and the views' gradients; there is a row.
cudaError_t enqueue_gjs(const RowProblem& p, const GjsViews& views, cudaStream_t stream);

}  // namespace fused_losses::cuda
