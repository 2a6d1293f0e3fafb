// Tiles whose vector lanes are classes: a few rows at a time, small enough that the exponentials written by the first
// pass are still in cache when the gradient pass scales them.
#pragma once

#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/tile_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class RowTile {
    using A = acc_t<Stored>;

public:
    RowTile(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          classes(problem.num_classes),
          in_place(std::is_same_v<Stored, A> && p.grad && p.grad_class_stride == 1),
          buffer(in_place || (reads_directly() && !p.grad) ? 0 : tile_rows * classes),
          spread(!p.needs_sum ? 0 : (p.soft_target ? tile_rows * classes : classes)) {
        const bool shared = p.needs_sum && !p.soft_target;
        for (std::int64_t c = 0; c < classes && shared; ++c)
            spread.data()[c] = p.class_weight ? as<A>(p.class_weight)[c] : A(1);
    }

    void forward(std::int64_t outer, std::int64_t first, int n, double& total) {
        rows.begin(p, outer, first, n);
        for (int i = 0; i < n; ++i) {
            if (rows.ignored[i])
                rows.clear(i);
            else
                reduce_row(outer, first + i, i);
        }
        rows.finish(p, outer, first, n, total);
        for (int i = 0; i < n && p.grad; ++i) {
            A* e = exponentials(outer, first + i, i);
            store_gradient(outer, first + i, i, e);
        }
    }

    void backward(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        rows.read_stats(p, outer, first, n);
        for (int i = 0; i < n; ++i) {
            A* e = exponentials(outer, first + i, i);
            if (!rows.ignored[i]) {
                const A* x = load_row(outer, first + i, e);
                if (p.soft_target) load_soft_target(outer, first + i, i);
                const A target_logit = p.target ? x[rows.target[i]] + rows.bias : A(0);
                exp_sum(x, 0, classes, rows.max[i], e);
                if (rows.bias != A(0)) e[rows.target[i]] = math::exp(target_logit - rows.max[i]);
            }
            store_gradient(outer, first + i, i, e);
        }
    }

private:
    bool reads_directly() const { return std::is_same_v<Stored, A> && p.logits_class_stride == 1; }

    // Where row i of the tile keeps its exponentials: in the gradient itself if it can, null if nobody needs them.
    A* exponentials(std::int64_t outer, std::int64_t row, int i) {
        if (in_place) return reinterpret_cast<A*>(gradient_row(outer, row));
        return buffer.data() ? buffer.data() + i * classes : nullptr;
    }

    Stored* gradient_row(std::int64_t outer, std::int64_t row) const {
        return static_cast<Stored*>(p.grad) + p.grad_stride.at(outer, row);
    }

    template <class Source>
    static void widen_row(const Source* source, std::int64_t stride, std::int64_t n, A* out) {
        if (stride == 1) {
#pragma omp simd
            for (std::int64_t c = 0; c < n; ++c) out[c] = widen(source[c]);
        } else {
            for (std::int64_t c = 0; c < n; ++c) out[c] = widen(source[c * stride]);
        }
    }

    // The row's logits as contiguous A: the caller's memory where possible, else a copy in `out`.
    const A* load_row(std::int64_t outer, std::int64_t row, A* out) const {
        const Stored* source = as<Stored>(p.logits) + p.logits_stride.at(outer, row);
        if constexpr (std::is_same_v<Stored, A>)
            if (reads_directly()) return source;
        widen_row(source, p.logits_class_stride, classes, out);
        return out;
    }

    A* spread_row(int i) { return spread.data() + (p.soft_target ? i * classes : 0); }

    void load_soft_target(std::int64_t outer, std::int64_t row, int i) {
        A* u = spread_row(i);
        const std::int64_t offset = p.soft_target_stride.at(outer, row);
        if (p.soft_target_is_stored)
            widen_row(as<Stored>(p.soft_target) + offset, p.soft_target_class_stride, classes, u);
        else
            widen_row(as<A>(p.soft_target) + offset, p.soft_target_class_stride, classes, u);
        const A smoothing = A(p.params[0]), uniform = smoothing / A(classes);
        const A* weight = as<A>(p.class_weight);
        for (std::int64_t c = 0; c < classes; ++c)
            u[c] = (weight ? weight[c] : A(1)) * ((A(1) - smoothing) * u[c] + uniform);
    }

    static A max_of(const A* x, std::int64_t begin, std::int64_t end, A start) {
        A m = start;
#pragma omp simd reduction(max : m)
        for (std::int64_t c = begin; c < end; ++c) m = x[c] > m ? x[c] : m;
        return m;
    }

    // sum exp(x - m) over [begin, end); the terms go to e unless it is null.
    static A exp_sum(const A* x, std::int64_t begin, std::int64_t end, A m, A* e) {
        A s = A(0);
        if (e) {
#pragma omp simd reduction(+ : s)
            for (std::int64_t c = begin; c < end; ++c) {
                const A term = math::exp(x[c] - m);
                e[c] = term;
                s += term;
            }
        } else {
#pragma omp simd reduction(+ : s)
            for (std::int64_t c = begin; c < end; ++c) s += math::exp(x[c] - m);
        }
        return s;
    }

    void reduce_row(std::int64_t outer, std::int64_t row, int i) {
        A* e = exponentials(outer, row, i);
        const A* x = load_row(outer, row, e);
        const std::int64_t y = rows.target[i];
        const A target_logit = x[y] + rows.bias;
        rows.target_logit[i] = target_logit;
        if (p.needs_sum && p.soft_target) load_soft_target(outer, row, i);
        // A biased target is taken out of the loops instead of being patched into a copy of the row.
        const bool biased = rows.bias != A(0);
        const std::int64_t left = biased ? y : classes, right = biased ? y + 1 : classes;
        A m = max_of(x, 0, left, biased ? target_logit : x[0]);
        m = max_of(x, right, classes, m);
        rows.max[i] = m;
        if (p.needs_sum) sum_spread(x, i, m);
        rows.sum[i] = exp_sum(x, 0, left, m, e) + exp_sum(x, right, classes, m, e);
        if (!biased) return;
        const A own = math::exp(target_logit - m);
        rows.sum[i] += own;
        if (e) e[y] = own;
    }

    void sum_spread(const A* x, int i, A m) {
        const A* u = spread_row(i);
        A centred = A(0), total = A(0);
#pragma omp simd reduction(+ : centred, total)
        for (std::int64_t c = 0; c < classes; ++c) {
            // A class of weight zero contributes nothing, even at -inf.
            centred += u[c] == A(0) ? A(0) : u[c] * (x[c] - m);
            total += u[c];
        }
        if (!p.soft_target) centred += u[rows.target[i]] * rows.bias;
        rows.centred[i] = centred;
        rows.sum_u[i] = total;
    }

    // e holds exp(z - max)
    void store_gradient(std::int64_t outer, std::int64_t row, int i, A* e) {
        Stored* grad = gradient_row(outer, row);
        const std::int64_t stride = p.grad_class_stride;
        if (rows.ignored[i]) {
            for (std::int64_t c = 0; c < classes; ++c) grad[c * stride] = narrow<Stored>(A(0));
            return;
        }
        const A alpha = rows.alpha[i], gamma = rows.gamma[i];
        if (p.needs_sum) {
            const A* u = spread_row(i);
#pragma omp simd
            for (std::int64_t c = 0; c < classes; ++c) e[c] = alpha * e[c] + gamma * u[c];
        } else {
#pragma omp simd
            for (std::int64_t c = 0; c < classes; ++c) e[c] *= alpha;
        }
        e[rows.target[i]] += rows.beta[i];
        if (in_place) return;
        if (stride == 1) {
#pragma omp simd
            for (std::int64_t c = 0; c < classes; ++c) grad[c] = narrow<Stored>(e[c]);
        } else {
            for (std::int64_t c = 0; c < classes; ++c) grad[c * stride] = narrow<Stored>(e[c]);
        }
    }

    const RowProblem& p;
    const std::int64_t classes;
    const bool in_place;  // exponentials are written into the gradient and scaled there
    Scratch<A> buffer, spread;
    TileRows<A> rows;
};

}  // namespace FL_ISA
}  // namespace fused_losses
