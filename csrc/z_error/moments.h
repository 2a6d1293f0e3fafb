// Count, mean and sum of squared deviations of numbers, in double. One struct for CPU and CUDA. Not in FL_ISA: kernels
// of all instruction sets hand it to one driver, and its functions are always inline.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace fused_losses {

struct Moments {
    double count = 0, mean = 0, m2 = 0;

    // Chan, Golub and LeVeque: exact up to rounding, and exact for equal means: a constant stays a constant.
    FL_HD void merge(const Moments& other) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        const double total = count + other.count, delta = other.mean - mean, share = other.count / total;
        mean += delta * share;
        m2 += other.m2 + delta * delta * count * share;
        count = total;
    }
};

// What a memory of earlier batches becomes with another one: it loses the share `momentum` of its weight first. A group
// without rows in the batch keeps what it has. Scores of 1e200 have squares that are no numbers any more: such a batch
// is not taken in, and a memory that holds such a thing is forgotten.
FL_HD Moments remember(const Moments& memory, const Moments& batch, double momentum) {
    const double faith = 1 - momentum;
    const bool sound = memory.mean - memory.mean == 0 && memory.m2 - memory.m2 == 0 && memory.count >= 0;
    Moments kept = sound ? memory : Moments{};
    if (batch.count == 0 || batch.mean - batch.mean != 0 || batch.m2 - batch.m2 != 0) return kept;
    kept = {kept.count * faith, kept.mean, kept.m2 * faith};
    kept.merge(batch);
    return kept;
}

// Sums over one run of rows, shifted by the run's first number: neither a division per row nor a second pass.
// Cancellation in m2 costs at most a factor n of rounding, because the shift is itself one of the n numbers, so that
// sum (x - mean)^2 >= (shift - mean)^2; a constant gives m2 = 0 exactly.
struct ShiftedSums {
    double shift = 0, sum = 0, squares = 0;
    std::int64_t count = 0;

    FL_HD void push(double x) {
        if (count == 0) shift = x;
        const double d = x - shift;
        sum += d;
        squares += d * d;
        ++count;
    }

    FL_HD Moments moments() const {
        if (count == 0) return {};
        const double n = static_cast<double>(count), offset = sum / n;
        const double m2 = squares - sum * offset;
        return {n, shift + offset, m2 < 0 ? 0.0 : m2};  // not fmax, which would turn a NaN into 0
    }
};

// Merges the moments of a batch into running ones, [3][groups] each, for groups [begin, end).
FL_HD void update_running_moments(double* running, const double* batch, std::int64_t groups, double momentum,
                                  std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
        const Moments kept = remember({running[g], running[groups + g], running[2 * groups + g]},
                                      {batch[g], batch[groups + g], batch[2 * groups + g]}, momentum);
        running[g] = kept.count;
        running[groups + g] = kept.mean;
        running[2 * groups + g] = kept.m2;
    }
}

}  // namespace fused_losses
