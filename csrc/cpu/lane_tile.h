// Tiles whose vector lanes are rows: scratch is [classes][64 rows], all reductions are vertical. Serves few classes
// (transposed while loading) and NCHW (pixels are contiguous as they are).
#pragma once

#include "cpu/scratch.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class LaneTile {
    using A = acc_t<Stored>;
    static constexpr int kLanes = Tiling::kLanes;

public:
    explicit LaneTile(const RowProblem& problem)
        : p(problem),
          classes(problem.num_classes),
          x_store(classes * kLanes),
          u_store(problem.soft_target ? classes * kLanes : 0),
          x(x_store.data()),
          u(u_store.data()) {}

    void forward(std::int64_t outer, std::int64_t first, int n, double& total) {
        load(outer, first, n);
        for (int i = 0; i < n; ++i) rows.target_logit[i] = x[rows.target[i] * kLanes + i];
        find_max();
        if (p.needs_sum) sum_spread(outer, first, n);
        exponentials();
        rows.finish(p, outer, first, n, total);
        if (!p.grad) return;
        store_gradient(outer, first, n);
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        load(outer, first, n);
        if (p.soft_target) load_soft_target(outer, first, n);
        rows.read_stats(p, outer, first, n);
        for (std::int64_t c = 0; c < classes; ++c) {
            A* row = x + c * kLanes;
#pragma omp simd
            for (int i = 0; i < kLanes; ++i) row[i] = math::exp(row[i] - rows.max[i]);
        }
        store_gradient(outer, first, n);
    }

private:
    // Logits of the tile, bias added. Ignored rows and unused lanes read as zeros, so that they stay finite.
    void load(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n, kLanes);
        const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, first);
        load_lanes(source, p.logits_stride.inner, p.logits_class_stride, n, x);
        for (int i = 0; i < kLanes && (rows.any_ignored || n < kLanes); ++i) {
            if (!rows.ignored[i]) continue;
            for (std::int64_t c = 0; c < classes; ++c) x[c * kLanes + i] = A(0);
        }
        for (int i = 0; i < n && rows.bias != A(0); ++i) x[rows.target[i] * kLanes + i] += rows.bias;
    }

    template <class Source>
    void load_lanes(const Source* source, std::int64_t row_stride, std::int64_t class_stride, int n, A* out) const {
        if (class_stride == 1) {
            for (int i = 0; i < n; ++i)
                for (std::int64_t c = 0; c < classes; ++c) out[c * kLanes + i] = widen(source[i * row_stride + c]);
            return;
        }
        for (std::int64_t c = 0; c < classes; ++c) {
            const Source* from = source + c * class_stride;
            A* to = out + c * kLanes;
            if (row_stride == 1) {
#pragma omp simd
                for (int i = 0; i < n; ++i) to[i] = widen(from[i]);
            } else {
                for (int i = 0; i < n; ++i) to[i] = widen(from[i * row_stride]);
            }
        }
    }

    void load_soft_target(std::int64_t outer, std::int64_t first, int n) {
        const std::int64_t offset = p.soft_target_stride.at(outer, first);
        const std::int64_t row = p.soft_target_stride.inner, cls = p.soft_target_class_stride;
        if (p.soft_target_is_stored)
            load_lanes(as<Stored>(p.soft_target) + offset, row, cls, n, u);
        else
            load_lanes(as<A>(p.soft_target) + offset, row, cls, n, u);
        const A smoothing = A(p.params[0]), uniform = smoothing / A(classes);
        for (std::int64_t c = 0; c < classes; ++c) {
            const A weight = p.class_weight ? as<A>(p.class_weight)[c] : A(1);
            A* row_u = u + c * kLanes;
            for (int i = 0; i < n; ++i) row_u[i] = weight * ((A(1) - smoothing) * row_u[i] + uniform);
            for (int i = n; i < kLanes; ++i) row_u[i] = A(0);
        }
    }

    A spread_of(std::int64_t c, int i) const {
        return u ? u[c * kLanes + i] : (p.class_weight ? as<A>(p.class_weight)[c] : A(1));
    }

    void sum_spread(std::int64_t outer, std::int64_t first, int n) {
        if (p.soft_target) load_soft_target(outer, first, n);
        for (std::int64_t c = 0; c < classes; ++c) {
            for (int i = 0; i < kLanes; ++i) {
                const A spread = spread_of(c, i);
                // A class of weight zero contributes nothing, even at -inf.
                rows.centred[i] += spread == A(0) ? A(0) : spread * (x[c * kLanes + i] - rows.max[i]);
                rows.sum_u[i] += spread;
            }
        }
    }

    void find_max() {
        for (int i = 0; i < kLanes; ++i) rows.max[i] = x[i];
        for (std::int64_t c = 1; c < classes; ++c) {
            const A* row = x + c * kLanes;
#pragma omp simd
            for (int i = 0; i < kLanes; ++i) rows.max[i] = row[i] > rows.max[i] ? row[i] : rows.max[i];
        }
    }

    void exponentials() {
        for (int i = 0; i < kLanes; ++i) rows.sum[i] = A(0);
        for (std::int64_t c = 0; c < classes; ++c) {
            A* row = x + c * kLanes;
#pragma omp simd
            for (int i = 0; i < kLanes; ++i) {
                row[i] = math::exp(row[i] - rows.max[i]);
                rows.sum[i] += row[i];
            }
        }
    }

    // x holds exp(z - max)
    void store_gradient(std::int64_t outer, std::int64_t first, int n) {
        for (std::int64_t c = 0; c < classes; ++c) {
            A* row = x + c * kLanes;
#pragma omp simd
            for (int i = 0; i < kLanes; ++i) row[i] *= rows.alpha[i];
            if (!p.needs_sum) continue;
            for (int i = 0; i < kLanes; ++i) row[i] += rows.gamma[i] * spread_of(c, i);
        }
        for (int i = 0; i < n; ++i) x[rows.target[i] * kLanes + i] += rows.beta[i];
        Stored* grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, first);
        const std::int64_t row_stride = p.grad_stride.inner, class_stride = p.grad_class_stride;
        if (class_stride == 1) {
            for (int i = 0; i < n; ++i)
                for (std::int64_t c = 0; c < classes; ++c) grad[i * row_stride + c] = narrow<Stored>(x[c * kLanes + i]);
            return;
        }
        for (std::int64_t c = 0; c < classes; ++c) {
            Stored* to = grad + c * class_stride;
            const A* from = x + c * kLanes;
            if (row_stride == 1) {
#pragma omp simd
                for (int i = 0; i < n; ++i) to[i] = narrow<Stored>(from[i]);
            } else {
                for (int i = 0; i < n; ++i) to[i * row_stride] = narrow<Stored>(from[i]);
            }
        }
    }

    const RowProblem& p;
    const std::int64_t classes;
    Scratch<A> x_store, u_store;
    A* const x;  // [classes][kLanes] logits, then exponentials, then gradient
    A* const u;  // [classes][kLanes] weighted soft target, or null
    TileRows<A> rows;
};

}  // namespace FL_ISA
}  // namespace fused_losses
