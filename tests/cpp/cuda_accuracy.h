// How exact the CUDA kernels are where approximate instructions are off by as much as their maker allows, next to plain
// PyTorch: of that, the least that it loses, as it rounds what it computes first to the dtype of the logits. Of floats
// plain PyTorch has no better ones to compute with, so that what follows counts, too.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda_emulation/approximate_instructions.h"
#include "cuda_emulation/scheduler.h"
#include "expected_rows.h"

namespace fused_losses_test {

// What plain PyTorch makes of a row first, and rounds.
enum class First { kLogProbabilities, kSoftplus, kDistances };

struct AccuracyCase {
    const char* loss;
    First first;
    int steps;  // operations of its formula, one after the other, that plain PyTorch rounds
};

// Logits of which that is what plain PyTorch has of it.
template <class Stored>
NaiveRow rounded_first(const NaiveRow& row, First first) {
    const auto rounded = [](Real x) { return Real(widen(narrow<Stored>(float(x)))); };
    const Real top = *std::max_element(row.logits.begin(), row.logits.end());
    const std::vector<Real> log_p = log_softmax(row);
    NaiveRow result = row;
    for (int j = 0; j < row.classes(); ++j) {
        Real& z = result.logits[j];
        switch (first) {
            case First::kLogProbabilities: z = rounded(log_p[j]); break;
            case First::kSoftplus: z = log(expm1(rounded(fmax(z, Real(0)) + log1p(exp(-fabs(z)))))); break;
            case First::kDistances: z = rounded(z - top); break;
        }
    }
    return result;
}

struct LargestError {
    Real loss = 0, grad = 0;

    void see(const NaiveResult& got, const NaiveResult& exact) {
        loss = fmax(loss, fabs(got.value - exact.value));
        for (std::size_t j = 0; j < exact.grad.size(); ++j) grad = fmax(grad, fabs(got.grad[j] - exact.grad[j]));
    }
};

template <class Stored>
void test_accuracy(const AccuracyCase& of, const Shape& shape) {
    const std::int64_t rows = shape.inner, classes = shape.classes;
    const NaiveLoss& naive = naive_loss(of.loss);
    Random random(7);
    Guarded<Stored> logits(layout_of(shape.kind, 1, rows, classes)), grad(logits.layout);
    std::vector<std::int64_t> target(rows);
    std::vector<float> values(rows);
    for (std::int64_t i = 0; i < rows; ++i) {
        target[i] = random.below(int(classes));
        for (int c = 0; c < classes; ++c) logits.at(0, i, c) = narrow<Stored>(float(3 * random.bell()));
    }
    RowProblem p;
    p.dtype = Precision<Stored>::dtype, p.reduction = Reduction::kNone, p.inner = rows, p.num_classes = classes;
    p.loss = index_of(AllLosses{}, of.loss);
    std::copy(naive.params[0].begin(), naive.params[0].end(), p.params);
    derive_params(p.loss, p.params);
    p.class_factors = class_factors_of(p.loss, p.params, /*soft_target=*/false);
    p.logits = logits.data(), p.grad = grad.data(), p.target = target.data(), p.row_values = values.data();
    p.logits_class_stride = p.grad_class_stride = logits.layout.cls;
    p.logits_stride = p.grad_stride = logits.layout.row, p.target_stride = {0, 1};
    const std::string name = describe(shape, p.dtype, p.loss);
    cuda_emulation::is_inexact = true;
    const auto launched = is_multi_reduction_loss(p.loss) ? cuda::enqueue_multi_reduction_forward(p, {}, nullptr)
                                                          : cuda::enqueue_forward(p, {}, nullptr);
    cuda_emulation::is_inexact = false;
    check(launched == cudaSuccess, "%s: not launched", name.c_str());

    LargestError ours, plain;
    for (std::int64_t i = 0; i < rows; ++i) {
        NaiveRow row;
        row.y = int(target[i]);
        NaiveResult got{values[i]};
        for (int c = 0; c < classes; ++c) {
            row.logits.push_back(widen(logits.at(0, i, c)));
            got.grad.push_back(widen(grad.at(0, i, c)));
        }
        const NaiveResult exact = naive_row(naive, p.params, row);
        NaiveResult of_plain = naive_row(naive, p.params, rounded_first<Stored>(row, of.first));
        for (Real& g : of_plain.grad) g = widen(narrow<Stored>(float(g)));
        of_plain.value = widen(narrow<Stored>(float(of_plain.value)));
        ours.see(got, exact);
        plain.see(of_plain, exact);
    }
    if (sizeof(Stored) == 2)
        check(10 * ours.loss <= plain.loss, "%s: loss off by %.2g, plain %.2g", name.c_str(), double(ours.loss),
              double(plain.loss));
    check(ours.grad <= (sizeof(Stored) == 4 ? of.steps : 1) * plain.grad, "%s: gradient off by %.2g, plain %.2g",
          name.c_str(), double(ours.grad), double(plain.grad));
}

// Tiles, rows in registers, pixels.
inline void test_accuracies() {
    const AccuracyCase cases[] = {
        {"cross_entropy", First::kLogProbabilities, 7}, {"mae", First::kLogProbabilities, 13},
        {"gce", First::kLogProbabilities, 16},          {"agce", First::kLogProbabilities, 20},
        {"aue", First::kLogProbabilities, 20},          {"js", First::kLogProbabilities, 16},
        {"focal", First::kLogProbabilities, 16},        {"taylor_ce", First::kLogProbabilities, 16},
        {"bounded_ce", First::kLogProbabilities, 13},   {"nce", First::kLogProbabilities, 10},
        {"ngce", First::kLogProbabilities, 18},         {"nfl", First::kLogProbabilities, 10},
        {"jal_fl", First::kLogProbabilities, 10},       {"ldr_kl", First::kSoftplus, 10},
        {"bi_tempered", First::kDistances, 20}};
    const Shape shapes[] = {{Kind::kRows, 1, 48, 10},
                            {Kind::kRows, 1, 48, 100},
                            {Kind::kRows, 1, 12, 1000},
                            {Kind::kPixels, 1, 48, 10},
                            {Kind::kPixels, 1, 48, 100}};
    for (const AccuracyCase& of : cases)
        for (const Shape& shape : shapes) {
            test_accuracy<float>(of, shape);
            test_accuracy<BFloat16>(of, shape);
            test_accuracy<Half>(of, shape);
        }
}

}  // namespace fused_losses_test
