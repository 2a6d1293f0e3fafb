// Softmax losses on tiles of a few rows, classes in vectors: small enough that the exponentials written by the first
// pass are still in cache when the gradient pass scales them.
#pragma once

#include "cpu/class_losses.h"
#include "cpu/gradient_rows.h"
#include "cpu/statistics_rows.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class Stored>
class HorizontalSoftmax {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    using Buffer = RowBuffer<Stored>;
    static constexpr std::integral_constant<int, 0> kFirst{};
    static constexpr std::integral_constant<int, 1> kSecond{};
    static constexpr double kCertain = 1.0 + 1.0 / 64;  // a row below this sum exp(z - max) is certain
    static constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

public:
    HorizontalSoftmax(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          classes(problem.num_classes),
          in_place(std::is_same_v<Stored, A> && p.grad && p.grad_class_stride == 1),
          gradient(problem, tile_rows),
          buffer(in_place || (Buffer::reads_directly(p) && !p.grad && !p.argmax) ? 0 : tile_rows * classes),
          soft_target(p.soft_target ? tile_rows * classes : 0),
          class_losses(problem),
          statistics(problem) {}

    void forward(std::int64_t outer, std::int64_t first, int n, LossSums& sums) {
        rows.begin(p, outer, first, n);
        for (int i = 0; i < n; ++i) {
            if (!rows.ignored(i)) reduce(outer, first + i, i);
            if (p.argmax) take_statistics(outer, first + i, i);
        }
        rows.evaluate_and_add(p, outer, first, n, sums);
        if (!p.grad) return;
        for (int i = 0; i < n; ++i) write_gradient(outer, first + i, i);
        gradient.finish<Stored>(outer, first, n);
    }

    // From what forward has saved, which is nothing for kClassLosses: their backward runs `forward`.
    void backward(std::int64_t outer, std::int64_t first, int n) {
        rows.begin(p, outer, first, n);
        rows.read_stats(p, outer, first, n);
        for (int i = 0; i < n; ++i) {
            if (!rows.ignored(i)) {
                A* e = exponentials(outer, first + i, i);
                if (p.soft_target) load_soft_target(outer, first + i, i);
                const A* const x = ordered_logits(outer, first + i, i, e);
                if (rows.bias != A(0))
                    exp_sum<true, false>(x, i, e, outer, first + i);
                else
                    exp_sum<false, false>(x, i, e, outer, first + i);
            }
            write_gradient(outer, first + i, i);
        }
        gradient.finish<Stored>(outer, first, n);
    }

private:
    // Where row i of the tile keeps its exponentials: in its gradient if they fit there; null if they are not kept.
    A* exponentials(std::int64_t outer, std::int64_t row, int i) const {
        if (in_place) return gradient.row<A>(outer, row, i);
        return buffer.data() ? buffer.data() + i * classes : nullptr;
    }

    void load_soft_target(std::int64_t outer, std::int64_t row, int i) {
        A* u = soft_target.data() + i * classes;
        const std::int64_t offset = p.soft_target_stride.at(outer, row);
        if (p.soft_target_is_stored)
            Buffer::widen_row(as<Stored>(p.soft_target) + offset, p.soft_target_class_stride, classes, u);
        else
            Buffer::widen_row(as<A>(p.soft_target) + offset, p.soft_target_class_stride, classes, u);
        const A* weight = as<A>(p.class_weight);
        if (p.class_factors == ClassFactors::kClassLosses) {
            for (std::int64_t c = 0; c < classes && weight; ++c) u[c] *= weight[c];
            return;
        }
        const SmoothedTarget<A> smoothed(p.params, A(classes));
        for (std::int64_t c = 0; c < classes; ++c) u[c] = smoothed(u[c], weight ? weight[c] : A(1));
    }

    // The factors u_j of SoftmaxRow; null means that all are 1.
    const A* factors_of(int i) const {
        if (p.soft_target) return soft_target.data() + i * classes;
        return p.class_factors == ClassFactors::kClassWeights ? as<A>(p.class_weight) : nullptr;
    }

    // A vector of logits with the target's replaced by the biased one.
    template <bool kBiased, class Logit, class Count>
    V biased(const Logit* x, std::int64_t c, Count count, int i) const {
        const V z = load_n_or(x + c, count, kMinusInfinity);
        if constexpr (!kBiased) return z;
        const V offset = A(rows.target[i] - c);  // exact wherever it is below V::size
        return math::select(V::iota() == offset, V(rows.target_logit[i]), z);
    }

    // Whether the classes may be taken in the order of pairs (cpu/memory.h): if all but the target are treated alike.
    // Then there is no copy of the logits, and the target's exponential is summed without its bias. Afterwards
    // exp(target + bias) - exp(target) is added. With a negative bias that is a subtraction, and where the target's
    // exponential is most of the sum, it would cancel.
    bool unordered(int i) const {
        const bool contiguous = p.logits_class_stride == 1 && p.grad_class_stride == 1;
        return sizeof(Stored) == 2 && contiguous && rows.bias >= A(0) && !factors_of(i);
    }

    // Calls body(logits, c, count, half) for every vector of classes [begin, end), a run of vectors; what it
    // writes goes to places from c on. half is 1 for the second one of a pair, else 0.
    template <bool kBiased, class Body>
    void for_logits(const A* x, std::int64_t outer, std::int64_t row, int i, std::int64_t begin, std::int64_t end,
                    Body body) const {
        if constexpr (sizeof(Stored) == 2)
            if (!x) return for_pairs(logits_at<Stored>(p, outer, row), begin, end, body);
        for_vectors<A>(end - begin, [&](std::int64_t from, auto count) {
            const std::int64_t c = begin + from;
            body(biased<kBiased>(x, c, count, i), c, count, kFirst);
        });
    }

    template <class Body>
    void for_pairs(const Stored* logits, std::int64_t begin, std::int64_t end, Body body) const {
        std::int64_t c = begin;
        for (; c + 2 * V::size <= end; c += 2 * V::size) {
            const auto pair = Pair<Stored>::load(logits + c);
            body(pair.first, c, Whole{}, kFirst);
            body(pair.second, c + V::size, Whole{}, kSecond);
        }
        for_vectors<A>(end - c, [&](std::int64_t rest, auto count) {
            body(load_n_or(logits + c + rest, count, kMinusInfinity), c + rest, count, kFirst);
        });
    }

    // The row's logits in the order of the classes; null where unordered(i): then nobody needs them in order.
    const A* ordered_logits(std::int64_t outer, std::int64_t row, int i, A* e) {
        if (unordered(i)) {
            const Stored* const stored = logits_at<Stored>(p, outer, row);
            rows.target_logit[i] = widen(stored[rows.target[i]]) + rows.bias;
            if (p.other_target) rows.other_logit[i] = widen(stored[rows.other_target[i]]);
            return nullptr;
        }
        const A* const x = Buffer::logits(p, outer, row, e);
        rows.target_logit[i] = p.target ? x[rows.target[i]] + rows.bias : A(0);
        if (p.other_target) rows.other_logit[i] = x[rows.other_target[i]];
        return x;
    }

    void reduce(std::int64_t outer, std::int64_t row, int i) {
        if (p.class_factors == ClassFactors::kClassLosses)
            sum_class_losses(outer, row, i);
        else if (rows.bias != A(0))
            reduce_row<true>(outer, row, i);
        else
            reduce_row<false>(outer, row, i);
    }

    template <bool kBiased>
    void reduce_row(std::int64_t outer, std::int64_t row, int i) {
        A* const e = exponentials(outer, row, i);
        const A* const x = ordered_logits(outer, row, i, e);
        rows.max[i] = find_max<kBiased>(x, outer, row, i);
        if (p.soft_target) load_soft_target(outer, row, i);
        if (p.class_factors == ClassFactors::kNone || factors_of(i)) {
            if (p.class_factors != ClassFactors::kNone) sum_factors<kBiased>(x, i);
            exp_sum<kBiased, false>(x, i, e, outer, row);
        } else {
            exp_sum<kBiased, true>(x, i, e, outer, row);
        }
        if (rows.sum[i] < A(kCertain)) find_residual<kBiased>(x, i, e, outer, row);
    }

    template <bool kBiased>
    void find_residual(const A* x, int i, const A* e, std::int64_t outer, std::int64_t row) {
        rows.sum_residual[i] = sum_below_one<kBiased>(x, i, e, outer, row) - (rows.sum[i] - A(1));
        rows.any_residual = true;
    }

    void sum_class_losses(std::int64_t outer, std::int64_t row, int i) {
        A *const e = exponentials(outer, row, i), *const shares = soft_target.data() + i * classes;
        const A* const x = ordered_logits(outer, row, i, e);  // may be e, which nothing writes before the second pass
        rows.max[i] = find_max<false>(x, outer, row, i);
        load_soft_target(outer, row, i);
        class_losses.sums_logs ? exp_sum<false, true>(x, i, nullptr, outer, row)
                               : exp_sum<false, false>(x, i, nullptr, outer, row);
        if (rows.sum[i] < A(kCertain)) find_residual<false>(x, i, nullptr, outer, row);
        const A log_sum = rows.log_sums(i).v[0];
        const V sum_neg_log_p = A(classes) * log_sum - rows.centred[i];
        const auto sums =
            class_losses.sum({rows.max[i], log_sum, sum_neg_log_p}, x, shares, p.grad ? e : nullptr, classes);
        rows.value[i] = sums.value.sum();
        rows.alpha[i] = sums.alpha.sum();
        rows.gamma[i] = A(1);
        if (!p.grad || !class_losses.sums_logs) return;
        const A gamma = sums.gamma.sum();
        for (std::int64_t c = 0; c < classes; ++c) shares[c] += gamma;
    }

    // The maximum may skip NaNs; the sum of exponentials does not.
    template <bool kBiased>
    A find_max(const A* x, std::int64_t outer, std::int64_t row, int i) const {
        if constexpr (sizeof(Stored) == 2)
            if (!x) return std::max(max_of(logits_at<Stored>(p, outer, row), classes), rows.target_logit[i]);
        V top[4] = {kMinusInfinity, kMinusInfinity, kMinusInfinity, kMinusInfinity};
        const Stored* const next_logits = logits_at<Stored>(p, outer, row + 1);
        for_vectors_ahead<A, 4>(classes, [&](std::int64_t c, auto count, auto chain) {
            if (chain == 0) __builtin_prefetch(next_logits + c / 4, /*for writing=*/0);  // exp_sum fetches the rest
            top[chain] = max(top[chain], biased<kBiased>(x, c, count, i));
        });
        return max(max(top[0], top[1]), max(top[2], top[3])).max();
    }

    // The sum of the exponentials below 1, for a row that is nearly certain of one class. All digits of 1 - p are in
    // it; the whole sum, which is just above 1, has rounded them off.
    template <bool kBiased>
    A sum_below_one(const A* x, int i, const A* e, std::int64_t outer, std::int64_t row) const {
        const Stored* const stored = logits_at<Stored>(p, outer, row);
        V all = A(0);
        for_runs(classes, kVectorsPerRun * V::size, [&](std::int64_t begin, std::int64_t end) {
            V sum = A(0);
            const auto add = [&](V term) { sum += math::select(term < V(A(1)), term, V(A(0))); };
            for_vectors<A>(end - begin, [&](std::int64_t from, auto count) {
                const std::int64_t c = begin + from;
                if (e && (x || !kBiased)) return add(load_n_or(e + c, count, A(0)));
                const V z = x ? biased<kBiased>(x, c, count, i) : biased<kBiased>(stored, c, count, i);
                add(exp_not_positive<Stored>(z - V(rows.max[i])));
            });
            all += sum;
        });
        return all.sum();
    }

    // sum exp(x - max), and with u = 1 the sum of x - max; the exponentials go to e unless it is null. Computing takes
    // longer than reading: meanwhile the next row's logits are fetched, and the memory of this row's gradient, or of
    // the next row's where exponentials are kept in it. A prefetch may point anywhere.
    template <bool kBiased, bool kOnes>
    void exp_sum(const A* x, int i, A* e, std::int64_t outer, std::int64_t row) {
        const Stored* const next_logits = logits_at<Stored>(p, outer, row + 1);
        const Stored* const grad = gradient.to_fetch<Stored>(outer, row + in_place);
        const V top = rows.max[i];
        V all = A(0), all_centred = A(0);
        Lines lines = gradient.lines;  // a copy can stay in registers
        for_runs(classes, kVectorsPerRun * V::size, [&](std::int64_t begin, std::int64_t end) {
            V sum = A(0), centred = A(0);
            for_logits<kBiased>(x, outer, row, i, begin, end, [&](V z, std::int64_t c, auto count, auto half) {
                lines.send_one();
                if (half == 0) __builtin_prefetch(next_logits + classes / 4 + c, /*for writing=*/0);
                if (half == 0 && grad) __builtin_prefetch(grad + c, /*for writing=*/1);
                const V below = z - top, term = exp_not_positive<Stored>(below);
                if (e) store_n(e + c, term, count);
                sum += term;
                if constexpr (kOnes) centred += first_of(below, count);
            });
            all += sum;
            all_centred += centred;
        });
        gradient.lines = lines;
        rows.sum[i] = all.sum();
        if constexpr (kOnes) rows.centred[i] = all_centred.sum(), rows.sum_u[i] = A(classes);
        if constexpr (kBiased && sizeof(Stored) == 2)
            if (!x) add_bias<kOnes>(i, widen(logits_at<Stored>(p, outer, row)[rows.target[i]]));
    }

    // Adds what the bias of the target contributes to sums that were taken without it.
    template <bool kOnes>
    void add_bias(int i, A unbiased) {
        const A with = rows.target_logit[i] - rows.max[i], without = unbiased - rows.max[i];
        rows.sum[i] += exp_not_positive<Stored>(with) - exp_not_positive<Stored>(without);
        if constexpr (kOnes) rows.centred[i] += rows.bias;
    }

    template <bool kBiased>
    void sum_factors(const A* x, int i) {
        const A* u = factors_of(i);
        const V top = rows.max[i];
        V all_centred = A(0), all = A(0);
        for_runs(classes, kVectorsPerRun * V::size, [&](std::int64_t begin, std::int64_t end) {
            V centred = A(0), sum = A(0);
            for_vectors<A>(end - begin, [&](std::int64_t from, auto count) {
                const std::int64_t c = begin + from;
                const V u_c = load_n_or(u + c, count, A(0));
                // A class of weight zero contributes nothing, even at -inf.
                const V term = u_c * (biased<kBiased>(x, c, count, i) - top);
                centred += math::select(u_c == V(A(0)), V(A(0)), term);
                sum += u_c;
            });
            all_centred += centred;
            all += sum;
        });
        rows.centred[i] = all_centred.sum();
        rows.sum_u[i] = all.sum();
    }

    // From the row's exponentials where those are of the logits as given: without a bias, classes contiguous.
    void take_statistics(std::int64_t outer, std::int64_t row, int i) {
        if (rows.ignored(i) || rows.bias != A(0) || p.logits_class_stride != 1) return statistics.run(outer, row, 1);
        const Stored* const x = logits_at<Stored>(p, outer, row);
        const A* const e = exponentials(outer, row, i);
        const V top = rows.max[i];
        V weighted = A(0);  // sum e (z - max)
        const auto add = [&](V z, std::int64_t c, auto count, auto) FL_INLINE {
            const V e_c = load_n_or(e + c, count, A(0));
            weighted += math::select(e_c == V(A(0)), V(A(0)), e_c * (z - top));
        };
        if constexpr (sizeof(Stored) == 2) {
            if (unordered(i)) {
                for_pairs(x, 0, classes, add);
                return statistics.take_row(outer, row, rows.sum[i], weighted.sum());
            }
        }
        for_vectors<A>(classes, [&](std::int64_t c, auto count) {
            add(load_n_or(x + c, count, kMinusInfinity), c, count, kFirst);
        });
        statistics.take_row(outer, row, rows.sum[i], weighted.sum());
    }

    // x with zeros behind its first `count` elements.
    static V first_of(V x, Whole) { return x; }
    static V first_of(V x, int count) { return math::select(first_n<A>(count), x, V(A(0))); }

    // grad = alpha e + gamma u, e = exp(z - max)
    void write_gradient(std::int64_t outer, std::int64_t row, int i) {
        Stored* const grad = gradient.row<Stored>(outer, row, i);
        if (rows.ignored(i)) return Buffer::zero_gradient(p, grad);
        A* const e = exponentials(outer, row, i);
        const A* const u = factors_of(i);
        const V alpha = rows.alpha[i], gamma = rows.gamma[i];
        const bool has_factors = p.class_factors != ClassFactors::kNone;
        Buffer::write_row(p, grad, unordered(i), [&](std::int64_t c, auto count) {
            V g = alpha * load_n_or(e + c, count, A(0));
            if (has_factors) g += gamma * (u ? load_n_or(u + c, count, A(0)) : V(A(1)));
            return g;
        });
        if (p.target) grad[rows.target[i] * p.grad_class_stride] = narrow<Stored>(rows.target_grad[i]);
        if (p.other_target) grad[rows.other_target[i] * p.grad_class_stride] = narrow<Stored>(rows.other_grad[i]);
    }

    const RowProblem& p;
    const std::int64_t classes;
    const bool in_place;  // exponentials are written into the gradient and scaled there
    GradientRows gradient;
    Scratch<A> buffer, soft_target;
    const ClassLosses<A> class_losses;
    StatisticsRows<Stored> statistics;
    TileRows<A> rows;
};

}  // namespace FL_ISA
}  // namespace fused_losses
