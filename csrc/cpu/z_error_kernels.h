// The boundary between the CPU driver of Z-Error and its kernels, which are compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "z_error/moments.h"
#include "z_error/problem.h"

namespace fused_losses {
inline namespace FL_ISA {

// Binary and regression losses: rows are cut into runs of `width`, a multiple of the number of tasks. A place in a run
// is a column: the rows of a column have one task, so that vector lanes are columns, however many tasks there are.
struct TaskColumns {
    static constexpr std::int64_t kWidth = 128;  // at least half of it, unless tasks are more

    std::int64_t tasks, width, padded;  // padded to whole vectors of any instruction set
    int labels;                         // group = task * labels + label

    explicit TaskColumns(const ZProblem& p)
        : tasks(std::max<std::int64_t>(1, is_binary(p.statistic) ? p.num_groups / 2 : p.num_groups)),
          width(tasks * std::max<std::int64_t>(1, kWidth / tasks)),
          padded(divide_up(width, 16) * 16),
          labels(is_binary(p.statistic) ? 2 : 1) {}
};

}  // namespace FL_ISA

// How rows are judged. Classification: by the rule of their group. of_group is null where there are more groups than
// rows; then each row computes the rule of its group. Binary and regression losses: by the rule of their label and
// column, in of_column [labels][kNumbers][padded]. The kNumbers are mean, std, low, high, and 1 if every row is kept,
// else 0.
struct ZErrorIntervals {
    static constexpr int kNumbers = 5;
    const KeepInterval* of_group = nullptr;
    const double* of_column = nullptr;
};

// Row `begin` must be in column 0, except for the gradient, which has no columns.
struct ZErrorKernels {
    void (*moments)(const ZProblem&, std::int64_t begin, std::int64_t end, Moments* of_group);
    // For more groups than rows: merges all rows, one by one, into `moments`, which are zeros [3][num_groups].
    void (*sparse_moments)(const ZProblem&, double* moments);
    void (*mask)(const ZProblem&, const ZErrorIntervals&, std::int64_t begin, std::int64_t end);
    // The mask and what the rows add to the loss.
    LossSums (*loss)(const ZProblem&, const ZErrorIntervals&, std::int64_t begin, std::int64_t end);
    void (*gradient)(const ZProblem&, std::int64_t begin, std::int64_t end);
    // The first row whose label is none (binary), or -1.
    std::int64_t (*find_bad_label)(const ZProblem&, std::int64_t begin, std::int64_t end);
};

FL_FOR_EACH_ISA(ZErrorKernels, z_error_kernels);

}  // namespace fused_losses
