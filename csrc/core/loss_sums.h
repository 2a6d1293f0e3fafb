// What rows add to the loss and to what its mean is divided by. Torch-free.
#pragma once

#include "core/host_device.h"

namespace fused_losses {

struct LossSums {
    double value, weight;

    FL_HD void add(const LossSums& other) {
        value += other.value;
        weight += other.weight;
    }
};

}  // namespace fused_losses
