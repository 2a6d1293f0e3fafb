// Tiles whose vector lanes are rows: all reductions over classes are vertical. Serves few classes (transposed while
// loading) and NCHW (pixels are contiguous as they are). Rows are taken kWidth at a time, as scratch [classes][kWidth]:
// what a class loop carries along fits a register.
#pragma once

#include "cpu/scratch.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class LaneTile {
    using A = acc_t<Stored>;
    static constexpr int kWidth = TileRows<A>::kGranule;

public:
    explicit LaneTile(const RowProblem& problem)
        : p(problem),
          classes(problem.num_classes),
          block_size(problem.num_classes * kWidth),
          x_store(block_size * (problem.grad ? Tiling::kLanes / kWidth : 1)),
          u_store(problem.needs_sum && problem.grad ? block_size * (Tiling::kLanes / kWidth) : block_size) {}

    void forward(std::int64_t outer, std::int64_t first, int n, double& total) {
        rows.begin(p, outer, first, n);
        for (int b = 0; b < n; b += kWidth) {
            A *x = x_of(b), *u = u_of(b);
            load(outer, first + b, b, std::min(kWidth, n - b), x);
            find_max(x, b);
            if (p.needs_sum) sum_spread(outer, first + b, b, std::min(kWidth, n - b), x, u);
            exponentials(x, b);
        }
        rows.finish(p, outer, first, n, total);
        for (int b = 0; b < n && p.grad; b += kWidth)
            store_gradient(outer, first + b, b, std::min(kWidth, n - b), x_of(b), u_of(b));
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        rows.read_stats(p, outer, first, n);
        for (int b = 0; b < n; b += kWidth) {
            const int count = std::min(kWidth, n - b);
            A *x = x_of(b), *u = u_of(b);
            load(outer, first + b, b, count, x);
            if (p.needs_sum) load_spread(outer, first + b, count, u);
            const A* max = rows.max + b;
            for (std::int64_t c = 0; c < classes; ++c) {
                A* at_c = x + c * kWidth;
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) at_c[i] = math::exp(at_c[i] - max[i]);
            }
            store_gradient(outer, first + b, b, count, x, u);
        }
    }

private:
    // The gradient needs the exponentials of the whole tile; the value alone one block at a time.
    A* x_of(int b) const { return x_store.data() + (p.grad ? b / kWidth * block_size : 0); }
    A* u_of(int b) const { return u_store.data() + (p.needs_sum && p.grad ? b / kWidth * block_size : 0); }

    // Logits of a block, bias added. Ignored rows and unused lanes read as zeros, so that they stay finite.
    void load(std::int64_t outer, std::int64_t row, int b, int n, A* x) {
        const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, row);
        load_lanes(source, p.logits_stride.inner, p.logits_class_stride, n, x);
        for (int i = 0; i < kWidth && (rows.any_ignored || n < kWidth); ++i) {
            if (!rows.ignored[b + i]) continue;
            for (std::int64_t c = 0; c < classes; ++c) x[c * kWidth + i] = A(0);
        }
        if (rows.bias != A(0))
            for (int i = 0; i < n; ++i) x[rows.target[b + i] * kWidth + i] += rows.bias;
        for (int i = 0; i < kWidth; ++i) rows.target_logit[b + i] = x[rows.target[b + i] * kWidth + i];
    }

    template <class Source>
    void load_lanes(const Source* source, std::int64_t row_stride, std::int64_t class_stride, int n, A* out) const {
        if (class_stride == 1 && n == kWidth) {
            for (std::int64_t c = 0; c < classes; ++c) {
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) out[c * kWidth + i] = widen(source[i * row_stride + c]);
            }
            return;
        }
        for (std::int64_t c = 0; c < classes; ++c) {
            const Source* from = source + c * class_stride;
            A* to = out + c * kWidth;
            if (row_stride == 1 && n == kWidth) {
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) to[i] = widen(from[i]);
            } else {
                for (int i = 0; i < n; ++i) to[i] = widen(from[i * row_stride]);
            }
        }
    }

    // u_j of SoftmaxRow
    void load_spread(std::int64_t outer, std::int64_t row, int n, A* u) const {
        if (p.soft_target) {
            const std::int64_t offset = p.soft_target_stride.at(outer, row);
            const std::int64_t row_stride = p.soft_target_stride.inner, class_stride = p.soft_target_class_stride;
            if (p.soft_target_is_stored)
                load_lanes(as<Stored>(p.soft_target) + offset, row_stride, class_stride, n, u);
            else
                load_lanes(as<A>(p.soft_target) + offset, row_stride, class_stride, n, u);
        }
        const A smoothing = A(p.params[0]), uniform = smoothing / A(classes);
        for (std::int64_t c = 0; c < classes; ++c) {
            const A weight = p.class_weight ? as<A>(p.class_weight)[c] : A(1);
            A* u_c = u + c * kWidth;
            for (int i = 0; i < kWidth; ++i) {
                const A share = p.soft_target ? (A(1) - smoothing) * u_c[i] + uniform : A(1);
                u_c[i] = i < n ? weight * share : A(0);
            }
        }
    }

    void find_max(const A* x, int b) {
        A max[kWidth];
        for (int i = 0; i < kWidth; ++i) max[i] = x[i];
        for (std::int64_t c = 1; c < classes; ++c) {
            const A* x_c = x + c * kWidth;
#pragma omp simd
            for (int i = 0; i < kWidth; ++i) max[i] = x_c[i] > max[i] ? x_c[i] : max[i];
        }
        for (int i = 0; i < kWidth; ++i) rows.max[b + i] = max[i];
    }

    void sum_spread(std::int64_t outer, std::int64_t row, int b, int n, const A* x, A* u) {
        load_spread(outer, row, n, u);
        const A* max = rows.max + b;
        A centred[kWidth] = {}, sum_u[kWidth] = {};
        for (std::int64_t c = 0; c < classes; ++c) {
            const A *x_c = x + c * kWidth, *u_c = u + c * kWidth;
#pragma omp simd
            for (int i = 0; i < kWidth; ++i) {
                // A class of weight zero contributes nothing, even at -inf.
                centred[i] += u_c[i] == A(0) ? A(0) : u_c[i] * (x_c[i] - max[i]);
                sum_u[i] += u_c[i];
            }
        }
        for (int i = 0; i < kWidth; ++i) rows.centred[b + i] = centred[i], rows.sum_u[b + i] = sum_u[i];
    }

    void exponentials(A* x, int b) {
        A max[kWidth], sum[kWidth] = {};
        for (int i = 0; i < kWidth; ++i) max[i] = rows.max[b + i];
        for (std::int64_t c = 0; c < classes; ++c) {
            A* x_c = x + c * kWidth;
#pragma omp simd
            for (int i = 0; i < kWidth; ++i) {
                const A e = math::exp(x_c[i] - max[i]);
                x_c[i] = e;
                sum[i] += e;
            }
        }
        for (int i = 0; i < kWidth; ++i) rows.sum[b + i] = sum[i];
    }

    // x holds exp(z - max)
    void store_gradient(std::int64_t outer, std::int64_t row, int b, int n, A* x, const A* u) const {
        const A *alpha = rows.alpha + b, *gamma = rows.gamma + b;
        for (std::int64_t c = 0; c < classes; ++c) {
            A* x_c = x + c * kWidth;
            if (p.needs_sum) {
                const A* u_c = u + c * kWidth;
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) x_c[i] = alpha[i] * x_c[i] + gamma[i] * u_c[i];
            } else {
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) x_c[i] *= alpha[i];
            }
        }
        for (int i = 0; i < n; ++i) x[rows.target[b + i] * kWidth + i] += rows.beta[b + i];
        Stored* grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, row);
        store_lanes(x, n, grad, p.grad_stride.inner, p.grad_class_stride);
    }

    void store_lanes(const A* x, int n, Stored* out, std::int64_t row_stride, std::int64_t class_stride) const {
        if (class_stride == 1) {
            for (int i = 0; i < n; ++i)
                for (std::int64_t c = 0; c < classes; ++c) out[i * row_stride + c] = narrow<Stored>(x[c * kWidth + i]);
            return;
        }
        for (std::int64_t c = 0; c < classes; ++c) {
            const A* from = x + c * kWidth;
            Stored* to = out + c * class_stride;
            if (row_stride == 1 && n == kWidth) {
#pragma omp simd
                for (int i = 0; i < kWidth; ++i) to[i] = narrow<Stored>(from[i]);
            } else {
                for (int i = 0; i < n; ++i) to[i * row_stride] = narrow<Stored>(from[i]);
            }
        }
    }

    const RowProblem& p;
    const std::int64_t classes, block_size;
    Scratch<A> x_store, u_store;  // per block [classes][kWidth]: logits, then exponentials, then gradient; u_j
    TileRows<A> rows;
};

}  // namespace FL_ISA
}  // namespace fused_losses
