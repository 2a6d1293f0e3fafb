// Blocks of rows as arrays of numbers, whatever the tensors' types and strides.
#pragma once

#include <cstring>
#include <limits>

#include "cpu/memory.h"
#include "z_error/rows.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace z_error {

constexpr int kBlockRows = 128;  // whole vectors of any instruction set

// Cuts rows [begin, begin + rows) where the outer index changes. Calls body(r, row, n) for each run of n rows; `row` is
// its first row, number begin + r.
template <class Body>
FL_ALWAYS_INLINE void for_runs(const ZProblem& p, std::int64_t begin, int rows, Body body) {
    Row row(p, begin);
    for (int r = 0; r < rows;) {
        const int n = static_cast<int>(p.outer == 1 || p.inner - row.inner > rows - r ? rows - r : p.inner - row.inner);
        body(r, row, n);
        r += n;
        row.number += n;
        row.inner = 0;
        ++row.outer;
    }
}

// Ones for an absent tensor.
template <class T>
void load(const ZProblem& p, const Elements& e, std::int64_t begin, int rows, T* __restrict out) {
    if (!e.data) {
        for (int r = 0; r < rows; ++r) out[r] = T(1);
        return;
    }
    visit_type(e.type, [&]<class Stored>() {
        for_runs(p, begin, rows, [&](int first, const Row& row, int n) {
            const std::int64_t stride = e.stride.inner;
            const Stored* const from = static_cast<const Stored*>(e.data) + e.stride.at(row.outer, row.inner);
            T* const to = out + first;
            if (stride == 1) {
                for (int r = 0; r < n; ++r) to[r] = as_number<T>(from[r]);
            } else if (stride == 0) {
                for (int r = 0; r < n; ++r) to[r] = as_number<T>(*from);
            } else {
                for (int r = 0; r < n; ++r) to[r] = as_number<T>(from[r * stride]);
            }
        });
    });
}

// acc is double only for float64 tensors.
template <class A>
void store(void* data, ElementType type, std::int64_t begin, int rows, const A* __restrict from) {
    switch (type) {
        case ElementType::kFloat16:
        case ElementType::kBFloat16:
            for (int r = 0; r < rows; ++r) write(data, type, begin + r, from[r]);
            return;
        default: std::memcpy(static_cast<A*>(data) + begin, from, rows * sizeof(A));
    }
}

// Calls body(i) for every vector of rows; i is the number of its first one.
template <class A, class Body>
FL_ALWAYS_INLINE void for_whole_vectors(int rows, Body body) {
    for (int i = 0; i < rows; i += Vec<A>::size) body(i);
}

// Rows of classification losses: targets, groups and scores.
struct ClassBlock {
    alignas(64) std::int64_t target[kBlockRows];
    alignas(64) std::int64_t group[kBlockRows];
    alignas(64) double score[kBlockRows];

    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        load(p, p.target, begin, rows, target);
        for (int r = 0; r < rows; ++r) group[r] = group_of_class(p, target[r]);
        p.gathers ? gather(p, begin, rows) : load(p, p.input, begin, rows, score);
        if (p.statistic != Statistic::kClassProb) return;
        for (int r = rows; r < kBlockRows; ++r) score[r] = 0;
        for_whole_vectors<double>(rows, [&](int i) {
            const auto x = Vec<double>::load(score + i);
            score_from(Statistic::kClassProb, x, x).store(score + i);
        });
    }

private:
    // The logits of the targets as scores.
    void gather(const ZProblem& p, std::int64_t begin, int rows) {
        visit_type(p.input.type, [&]<class Stored>() {
            for_runs(p, begin, rows, [&](int first, const Row& row, int n) {
                const Stored* const from =
                    static_cast<const Stored*>(p.input.data) + p.input.stride.at(row.outer, row.inner);
                for (int r = 0; r < n; ++r) {
                    const std::int64_t y = group[first + r];
                    score[first + r] =
                        y < 0 ? 0.0 : as_number<double>(from[r * p.input.stride.inner + y * p.class_stride]);
                }
            });
        });
    }
};

// Rows of the binary and regression losses: scores and labels.
struct ScoreBlock {
    using D = Vec<double>;
    using Mask = math::mask_t<D>;
    alignas(64) double score[kBlockRows];
    alignas(64) double target[kBlockRows];

    // Lanes beyond the last row hold NaN, which is no label and no score.
    void fill(const ZProblem& p, std::int64_t begin, int rows) {
        load(p, p.input, begin, rows, score);
        load(p, p.target, begin, rows, target);
        for (int r = rows; r < kBlockRows && r % D::size != 0; ++r)
            score[r] = target[r] = std::numeric_limits<double>::quiet_NaN();
        if (p.statistic == Statistic::kBceLogit) return;
        for_whole_vectors<double>(
            rows, [&](int i) { score_from(p.statistic, D::load(score + i), D::load(target + i)).store(score + i); });
    }

    // Which rows of vector i have a label. Regression has one group, to which all belong whose label is not missing.
    template <bool kBinary>
    FL_ALWAYS_INLINE Mask has_label(int i, int label) const {
        const D y = D::load(target + i);
        if constexpr (!kBinary) return y == y;
        return label == 1 ? y > D(0.5) : y <= D(0.5);
    }
};

}  // namespace z_error
}  // namespace FL_ISA
}  // namespace fused_losses
