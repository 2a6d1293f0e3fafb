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
    double weight = 0;
};

// Besides a RowProblem with rows, classes, targets and row_values.
struct GjsViews {
    int count = 0;
    double label_weight = 0;
    GjsView views[kMostViews];

    double normaliser() const { return -1 / ((1 - label_weight) * std::log1p(-label_weight)); }
};

inline namespace FL_ISA {

// With p_i the probabilities of view i, a_i its weight, a that of the label, m = a e_y + sum_i a_i p_i and Z the
// normaliser,
//   value = Z (-a log m_y + sum_i a_i D_i), D_i = sum_j p_ij v_ij, v_ij = log(p_ij / m_j)
//   gradient in z_ij = Z a_i p_ij (v_ij - D_i)
// v is a difference of logarithms, of which that of m serves all views. A p of 0 has no part.
struct GJS {
    template <class T>
    FL_HD static T log_mean(T m) {  // which is 0 where nobody expects a class
        const T least = T(std::numeric_limits<math::scalar_t<T>>::min());
        return math::log_normal(math::select(m < least, least, m));
    }

    template <class T>
    FL_HD static T log_ratio(T p, T log_p, T log_mean) {
        return math::select(p == T(0), T(0), log_p - log_mean);
    }
};

}  // namespace FL_ISA
}  // namespace fused_losses
