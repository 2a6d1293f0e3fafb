// How exact the CUDA kernels are where approximate instructions are off by as much as their maker allows: cross entropy
// and its gradient, next to plain PyTorch's, whose log_softmax rounds to the dtype of the logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda_emulation/scheduler.h"

namespace fused_losses_test {

using namespace fused_losses;

struct LargestError {
    double loss = 0, grad = 0;

    void see(double loss_error, double grad_error) {
        loss = std::max(loss, std::fabs(loss_error)), grad = std::max(grad, std::fabs(grad_error));
    }
};

template <class Stored>
void test_accuracy(const char* name, Dtype dtype, int classes, bool are_pixels) {
    constexpr int rows = 96;
    Random random(7);
    std::vector<Stored> logits(rows * classes), grad(rows * classes);
    std::vector<std::int64_t> target(rows);
    std::vector<float> values(rows);
    for (Stored& z : logits) z = narrow<Stored>(float(3 * random.bell()));
    for (std::int64_t& y : target) y = random.below(classes);
    RowProblem p;
    p.dtype = dtype, p.reduction = Reduction::kNone, p.inner = rows, p.num_classes = classes, p.stats_count = 3;
    p.logits = logits.data(), p.grad = grad.data(), p.target = target.data(), p.row_values = values.data();
    p.logits_class_stride = p.grad_class_stride = are_pixels ? rows : 1;
    p.logits_stride = p.grad_stride = {0, are_pixels ? 1 : classes}, p.target_stride = {0, 1};
    cuda_emulation::approximation_error = 2;
    check(cuda::enqueue_forward(p, {}, nullptr) == cudaSuccess, "%s: not launched", name);
    cuda_emulation::approximation_error = 0;

    LargestError ours, plain;
    for (int i = 0; i < rows; ++i) {
        const auto at = [&](int j) { return i * p.logits_stride.inner + j * p.logits_class_stride; };
        float top = -1e30f, sum = 0;
        double exact_sum = 0;
        for (int j = 0; j < classes; ++j) top = std::max(top, float(widen(logits[at(j)])));
        for (int j = 0; j < classes; ++j) {
            sum += std::exp(float(widen(logits[at(j)])) - top);
            exact_sum += std::exp(double(widen(logits[at(j)])) - double(top));
        }
        for (int j = 0; j < classes; ++j) {
            const double is_target = j == target[i], z = double(widen(logits[at(j)]));
            const double log_p = (z - double(top)) - std::log(exact_sum), g = std::exp(log_p) - is_target;
            const float rounded = widen(narrow<Stored>((float(z) - top) - std::log(sum)));
            const float plain_g = widen(narrow<Stored>(std::exp(rounded) - float(is_target)));
            ours.see(is_target * (double(values[i]) + log_p), double(widen(grad[at(j)])) - g);
            plain.see(is_target * (log_p - double(rounded)), double(plain_g) - g);
        }
    }
    const std::string of =
        std::string(name) + ", " + std::to_string(classes) + (are_pixels ? " classes, pixels" : " classes");
    if (sizeof(Stored) == 2)
        check(10 * ours.loss <= plain.loss, "%s: loss off by %.2g, plain %.2g", of.c_str(), ours.loss, plain.loss);
    check(ours.grad <= plain.grad, "%s: gradient off by %.2g, plain %.2g", of.c_str(), ours.grad, plain.grad);
}

// Tiles, rows in registers, pixels.
inline void test_accuracies() {
    for (const int classes : {10, 100, 1000})
        for (const bool are_pixels : {false, true}) {
            if (are_pixels && classes == 1000) continue;
            test_accuracy<float>("float32", Dtype::kFloat32, classes, are_pixels);
            test_accuracy<BFloat16>("bfloat16", Dtype::kBFloat16, classes, are_pixels);
            test_accuracy<Half>("float16", Dtype::kFloat16, classes, are_pixels);
        }
}

}  // namespace fused_losses_test
