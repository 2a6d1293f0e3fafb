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

}  // namespace fused_losses
