// loss = sum of row values [/ sum of row weights]: partial sums of blocks, then one block over those, in
// double. No atomics: the order of additions follows from the number of rows alone.
#include "core/numeric.h"
#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"

namespace fused_losses::cuda {
namespace {

constexpr std::int64_t kSingleBlockRows = 8 * kBlock;  // up to here the second step alone does it
constexpr std::int64_t kMaxPartials = 1024;

std::int64_t partials_for(std::int64_t rows) {
    return rows <= kSingleBlockRows ? 0 : std::min((rows + kSingleBlockRows - 1) / kSingleBlockRows, kMaxPartials);
}

struct Sums {
    double values, weights;

    FL_DEVICE void add(const Sums& other) {
        values += other.values;
        weights += other.weights;
    }
};

// Each thread of the grid adds every (threads in the grid)-th entry; a null `weights` counts as zeros.
template <class In>
FL_DEVICE Sums sum_strided(const In* values, const In* weights, std::int64_t count) {
    Sums sums{0, 0};
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock;
    for (std::int64_t i = std::int64_t(blockIdx.x) * kBlock + threadIdx.x; i < count; i += step)
        sums.add({static_cast<double>(values[i]), weights ? static_cast<double>(weights[i]) : 0.0});
    return sums;
}

// The sum over the block's threads, in thread 0.
FL_DEVICE Sums sum_over_block(Sums sums) {
    __shared__ Sums of_thread[kBlock];
    of_thread[threadIdx.x] = sums;
    for (int half = kBlock / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) of_thread[threadIdx.x].add(of_thread[threadIdx.x + half]);
    }
    return of_thread[0];
}

// partials: [2][gridDim.x]
template <class A>
__global__ void __launch_bounds__(kBlock)
    sum_rows(const A* values, const A* weights, std::int64_t rows, double* partials) {
    const Sums sums = sum_over_block(sum_strided(values, weights, rows));
    if (threadIdx.x != 0) return;
    partials[blockIdx.x] = sums.values;
    partials[gridDim.x + blockIdx.x] = sums.weights;
}

// One block. Nothing to average gives 0, not NaN.
template <class In, class A>
__global__ void __launch_bounds__(kBlock) finish_reduction(const In* values, const In* weights, std::int64_t count,
                                                           bool mean, double guard, A* loss, A* denominator) {
    const Sums sums = sum_over_block(sum_strided(values, weights, count));
    if (threadIdx.x != 0) return;
    const double total = sums.weights + guard;
    if (denominator) *denominator = static_cast<A>(total);
    const double mean_value = total == 0.0 ? 0.0 : sums.values / total;
    *loss = static_cast<A>(mean ? mean_value : sums.values);
}

template <class A>
cudaError_t reduce(const RowProblem& p, double* scratch, A* loss, A* denominator, cudaStream_t stream) {
    const A* values = static_cast<const A*>(p.row_values);
    const A* weights = static_cast<const A*>(p.row_weights);
    const bool mean = weights != nullptr;
    const double guard = p.reduction == Reduction::kActiveMean ? kActiveGuard : 0.0;
    const std::int64_t rows = p.rows(), partials = partials_for(rows);
    if (partials == 0)
        return launch(finish_reduction<A, A>, 1, stream, values, weights, rows, mean, guard, loss, denominator);
    const cudaError_t error =
        launch(sum_rows<A>, static_cast<unsigned>(partials), stream, values, weights, rows, scratch);
    if (error != cudaSuccess) return error;
    const double* const partial_weights = mean ? scratch + partials : nullptr;
    return launch(finish_reduction<double, A>, 1, stream, scratch, partial_weights, partials, mean, guard, loss,
                  denominator);
}

}  // namespace

std::int64_t reduction_scratch(std::int64_t rows) { return 2 * partials_for(rows); }

cudaError_t enqueue_reduction(const RowProblem& p, double* scratch, void* loss, void* denominator,
                              cudaStream_t stream) {
    if (p.dtype == Dtype::kFloat64)
        return reduce(p, scratch, static_cast<double*>(loss), static_cast<double*>(denominator), stream);
    return reduce(p, scratch, static_cast<float*>(loss), static_cast<float*>(denominator), stream);
}

}  // namespace fused_losses::cuda
