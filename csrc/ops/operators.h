// The operators' entries (ops.cpp has their schemas). torch calls each with a `stack`, from which arguments are taken
// and where results are put.
#pragma once

#include "ops/backend.h"
#include "ops/tensor.h"

namespace fused_losses {

using Library = torch::stable::detail::StableLibrary;

// Each gives a device's library the entries of one file.
void implement_row_losses(Library& m);
void implement_row_statistics(Library& m);
void implement_elr(Library& m);
void implement_gjs(Library& m);
void implement_rescaling(Library& m);
void implement_z_error(Library& m);

// The results of row statistics, to which it points `p`.
struct RowStatisticsTensors {
    Tensor stats, argmax;

    RowStatisticsTensors(RowProblem& p, DtypeCode acc, Device device);
};

inline const Backend& backend_of([[maybe_unused]] Device device) {
#ifdef FL_WITH_CUDA
    if (device.is_cuda()) return cuda_backend;
#endif
    return cpu_backend;
}

}  // namespace fused_losses
