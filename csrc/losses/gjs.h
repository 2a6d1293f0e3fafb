// The generalised Jensen-Shannon divergence of a label and several predictions (2105.04522). Torch-free.
#pragma once

#include <cmath>

#include "core/math.h"
#include "core/row_problem.h"

namespace fused_losses {

constexpr int kMostViews = 7;

struct GjsView {
    const void* logits = nullptr;  // acc, as all of these
    RowStride logits_stride;
    std::int64_t logits_class_stride = 1;
    void* grad = nullptr;  // null: none is wanted
    RowStride grad_stride;
    std::int64_t grad_class_stride = 1;
    double share = 0;
};

// Besides a RowProblem with rows, classes, targets and row_values.
struct GjsViews {
    int count = 0;
    double label_share = 0;
    GjsView views[kMostViews];

    double normaliser() const { return -1 / ((1 - label_share) * std::log1p(-label_share)); }
};

inline namespace FL_ISA {

// With p_i the probabilities of view i, a_i its share, a that of the label, m = a e_y + sum_i a_i p_i and Z the
// normaliser,
//   value = Z (-a log m_y + sum_i a_i D_i), D_i = sum_j p_ij v_ij, v_ij = log(p_ij / m_j)
//   gradient in z_ij = Z a_i p_ij (v_ij - D_i)
// A p of 0 has no part: its logarithm is that of the smallest normal number.
struct GJS {
    template <class T>
    FL_HD static T log_ratio(T p, T m) {
        return math::log_normal(positive(p / positive(m)));
    }

    template <class T>
    FL_HD static T positive(T x) {
        const T least = T(std::numeric_limits<math::scalar_t<T>>::min());
        return math::select(x < least, least, x);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
