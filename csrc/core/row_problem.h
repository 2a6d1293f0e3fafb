// One call of a row loss as plain data: what the shared entry code has checked and allocated, and what a CPU or CUDA
// driver needs to run it. Torch-free.
//
// Rows (samples, pixels) are numbered in logical order as outer * inner + i. After coalescing, two strides reach every
// row: (N, C) and channels_last are one run of rows, NCHW is `outer` images of `inner` pixels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"

namespace fused_losses {

enum class Dtype : std::uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16 };
FL_HD int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : (dtype == Dtype::kFloat32 ? 4 : 2); }
enum class IndexType : std::uint8_t { kInt64, kInt32, kInt16, kUInt8 };
FL_HD int bytes_of(IndexType type) { return 8 >> (type == IndexType::kUInt8 ? 3 : static_cast<int>(type)); }

// How many pieces of `size` it takes for `count`.
template <class T>
FL_HD constexpr T divide_up(T count, std::type_identity_t<T> size) {
    return (count + size - 1) / size;
}

// kActiveMean: over the rows whose loss is positive.
enum class Reduction : std::uint8_t { kNone, kSum, kMean, kActiveMean };
// Added to the number of active rows, as the authors of HEM do: no active row gives 0, not NaN.
constexpr double kActiveGuard = 1e-6;
// The u_j of a softmax loss (softmax_loss.h): not used, 1, the class weights (1 without), or the weighted soft target.
// kClassLosses: each class has a loss of its own, whose share is the weighted soft target (cpu/class_losses.h).
enum class ClassFactors : std::uint8_t { kNone, kOnes, kClassWeights, kSoftTarget, kClassLosses };

// Of a loss, with those that are derived from them.
constexpr int kMaxParams = 10;

struct RowStride {
    std::int64_t outer = 0, inner = 0;

    FL_HD std::int64_t at(std::int64_t o, std::int64_t i) const { return o * outer + i * inner; }
};

// acc below is double for float64 logits, float otherwise. A null pointer means "absent".
struct RowProblem {
    Dtype dtype = Dtype::kFloat32;
    IndexType index_type = IndexType::kInt64;
    Reduction reduction = Reduction::kMean;
    int device = -1;  // index of the CUDA device
    std::int64_t outer = 1, inner = 0, num_classes = 0;

    // Inputs
    const void* logits = nullptr;  // dtype
    RowStride logits_stride;
    std::int64_t logits_class_stride = 1;
    const void* target = nullptr;  // index_type; null with a soft target
    RowStride target_stride;
    const void* soft_target = nullptr;  // acc, or dtype if soft_target_is_stored
    bool soft_target_is_stored = false;
    RowStride soft_target_stride;
    std::int64_t soft_target_class_stride = 1;
    const void* class_weight = nullptr;   // acc [C]
    const void* sample_weight = nullptr;  // acc, one per row
    RowStride sample_weight_stride;
    std::int64_t ignore_index = -100;

    // The loss
    int loss = 0;  // index into CompiledLosses
    double params[kMaxParams] = {};
    ClassFactors class_factors = ClassFactors::kNone;
    int stats_count = 0;  // numbers per row that its gradient needs: 3 or 4, or the state of a MultiReductionLoss
    double logit_bias = 0;
    const void* first_param = nullptr;  // acc, one (stride 0) or, of margin losses, [C]; takes the place of params[0]
    std::int64_t first_param_stride = 0;
    const void* logit_bias_device = nullptr;  // acc, on the logits' device; read by the kernel in place of logit_bias

    // Outputs of forward
    void* row_values = nullptr;  // acc [rows], sample_weight * value
    // acc [stats_count][rows]. Softmax losses: in the order of SavedNumber (softmax_loss.h).
    void* stats = nullptr;
    // What rows look like (row_statistics.h): acc [kRowStatistics][rows] and [rows].
    void* row_statistics = nullptr;
    std::int64_t* argmax = nullptr;
    void* grad = nullptr;  // dtype
    RowStride grad_stride;
    std::int64_t grad_class_stride = 1;

    // What one row's gradient is multiplied by: upstream * sample_weight / denominator
    const void* upstream = nullptr;  // acc, one per row or a single one (stride 0); null means 1
    RowStride upstream_stride;
    const void* denominator = nullptr;  // acc, one; null means 1, zero makes the gradient zero

    // Two labels a row. The loss is lam times that of target and 1 - lam times that of other_target.
    const void* other_target = nullptr;  // index_type; null: there is one label
    RowStride other_target_stride;
    const void* lam = nullptr;  // acc, one per row; null: lam_of_all
    RowStride lam_stride;
    double lam_of_all = 1;
    double label_scale[2] = {1, 1};            // what each label's losses are multiplied by besides, on the CPU
    const void* label_denominators = nullptr;  // and divided by on CUDA; acc [2], zero makes them zero

    // A bit per logit, which forward makes and gradient takes where that says all (multi_reduction_loss.h).
    void* bits = nullptr;

    // CUDA forward writes the gradient before the denominator and the upstream gradient are known: it takes these, or
    // *denominator if that is 0.
    double assumed_denominator = 0, assumed_upstream = 1;
    void* written_upstream = nullptr;  // acc, one: forward leaves assumed_upstream here, for backward; null means 1
    bool grad_is_written = false;      // backward: grad is what forward wrote, right for those two
    double* next_upstream = nullptr;   // host memory where backward leaves an upstream gradient that was not that one

    FL_HD std::int64_t rows() const { return outer * inner; }
};

}  // namespace fused_losses
