// The device that cuda_emulation is for the next launches, and the order in which it runs them.
#pragma once

#include "cuda_emulation/approximate_instructions.h"
#include "cuda_emulation/scheduler.h"

namespace fused_losses_test {

// How the next launches run: their results must not depend on it.
inline void shuffle_launches(bool any_grid) {
    cuda_emulation::resident = cuda_emulation::one_in(2) ? 1 : 1 + cuda_emulation::random() % 3;
    cuda_emulation::largest_grid = any_grid && cuda_emulation::one_in(2) ? 1 + cuda_emulation::random() % 2 : ~0u;
}

// How much of a row fits into shared memory, whether blocks can share one, and how exact approximate instructions are.
// Sums over all rows depend on it.
inline void choose_device() {
    const int sizes[] = {65536, 65536, 40960, 20480, 20480};
    cuda_emulation::shared_per_block = sizes[cuda_emulation::random() % 5];
    cuda_emulation::shared_per_multiprocessor = cuda_emulation::shared_per_block * (1 + cuda_emulation::random() % 2);
    const unsigned clusters[] = {1, 8, 16};
    cuda_emulation::largest_cluster = clusters[cuda_emulation::random() % 3];
    const int multiprocessors[] = {3, 4, 8};  // of two blocks each: room for four, eight or sixteen in a cluster
    cuda_emulation::multiprocessors = multiprocessors[cuda_emulation::random() % 3];
    ++cuda_emulation::device;  // what kernels found on the last one is remembered
    cuda_emulation::is_inexact = cuda_emulation::one_in(2);
}

// On which 16 blocks can share a row.
inline void choose_device_with_clusters() {
    cuda_emulation::shared_per_block = 65536;
    cuda_emulation::shared_per_multiprocessor = 2 * cuda_emulation::shared_per_block;
    cuda_emulation::largest_cluster = 16;
    cuda_emulation::multiprocessors = 8;
    ++cuda_emulation::device;
    cuda_emulation::is_inexact = cuda_emulation::one_in(2);
}

}  // namespace fused_losses_test
