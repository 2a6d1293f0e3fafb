// A random Z-Error problem, run by cuda_emulation and compared with the published formulas in long double.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "column.h"
#include "cuda/z_error.h"
#include "cuda_emulation/scheduler.h"
#include "guarded.h"
#include "z_error_formulas.h"

namespace fused_losses_test {

template <class A>
class ZCase {
    static constexpr ElementType acc_type = std::is_same_v<A, double> ? ElementType::kFloat64 : ElementType::kFloat32;

public:
    ZCase(Random& r, const std::string& what)
        : random(r),
          name(what),
          rows(rows_of(r)),
          statistic(Statistic(r.below(7))),
          tasks(is_class(statistic) ? 1 : 1 + r.below(3)),
          groups(is_class(statistic) ? classes_of(r) : (is_binary(statistic) ? 2 * tasks : tasks)),
          entropy(is_class(statistic) && groups <= 100 && rows <= 2050 && r.one_in(2)),
          gathers(statistic == Statistic::kClassScore && groups < 40 && !entropy && r.one_in(2)),
          outer(r.one_in(3) && rows % 2 == 0 && rows > 0 ? 2 : 1),
          input(input_type(r), input_stride(), rows * input_width()),
          target(target_type(r), {rows / outer * 2, 2}, 2 * rows),
          computed_scores(acc_type, {rows / outer, 1}, rows),
          sample_weight(ElementType::kFloat32, {rows / outer, 1}, rows),
          values(acc_type, {rows / outer, 1}, rows),
          class_weight(ElementType::kFloat32, {0, 1}, groups),
          pos_weight(ElementType::kFloat32, {0, 1}, tasks),
          threshold(ElementType::kFloat32, {0, 1}, 2),
          upstream(ElementType::kFloat32, {rows / outer, 1}, rows) {
        p.statistic = statistic;
        p.acc_is_double = std::is_same_v<A, double>;
        p.outer = outer, p.inner = rows / outer, p.num_groups = groups;
        p.input = input.elements, p.target = target.elements;
        p.gathers = gathers, p.class_stride = 1;
        if (entropy) score_by_entropy();
        p.ignore_index = r.one_in(2) ? 0 : -100;
        p.tail = Tail(r.below(3));
        p.min_count = r.one_in(2) ? 2 : 5;
        p.keep_small = r.one_in(2);
        p.reduction = Reduction(r.below(3));
        p.thresholds[0] = r.uniform(0.3, 2), p.thresholds[1] = r.uniform(0.3, 2);
        p.num_thresholds = groups == 1 ? 1 : 1 + r.below(2);
        if (r.one_in(2)) p.threshold = threshold.elements;
        if (r.one_in(2)) p.sample_weight = sample_weight.elements;
        if (is_class(statistic)) p.values = values.elements;
        if (is_class(statistic) && r.one_in(2)) p.class_weight = class_weight.elements;
        if (is_binary(statistic) && r.one_in(2))
            p.pos_weight = pos_weight.elements, p.num_pos_weights = r.one_in(2) ? 1 : tasks;
        fill();
    }

    void test() {
        if (entropy) compute_scores();
        compute_naive();
        test_moments();
        Result given(*this), own(*this), masked(*this);
        run_mask(masked);
        run_loss(given, false);
        run_loss(own, true);
        check(given == own, "%s: statistics within the loss give other bits", name.c_str());
        check(masked.mask == given.mask && masked.scores == given.scores && masked.kept == given.kept,
              "%s: the loss has another mask", name.c_str());
        compare_mask(given);
        compare_loss(given);
        if (!is_class(statistic) && rows > 0) test_gradient(given);
    }

private:
    static std::int64_t rows_of(Random& r) {
        static const int some[] = {0, 1, 2, 5, 300, 2048, 2050, 6000, 9000};
        return some[r.below(9)];
    }
    static std::int64_t classes_of(Random& r) {
        static const int some[] = {1, 2, 10, 100, 256, 257, 1000, 3000};
        return some[r.below(8)];
    }
    static ElementType input_type(Random& r) {
        return std::is_same_v<A, double> ? ElementType::kFloat64 : ElementType(1 + r.below(3));
    }
    ElementType target_type(Random& r) {
        if (!is_class(statistic))
            return is_binary(statistic) && r.one_in(3) ? ElementType::kUInt8 : ElementType(r.below(2));
        return ElementType(int(ElementType::kInt64) + r.below(3));
    }
    std::int64_t input_width() const { return gathers || entropy ? groups + 3 : 1; }
    RowStride input_stride() const { return {rows / outer * input_width(), input_width()}; }

    void score_by_entropy() {
        p.entropy = {input.elements, 1, random.one_in(2) ? 0.0 : 0.2, random.uniform(0, 2)};
        if (random.one_in(2)) p.entropy.logit_bias_device = &bias_on_device;
        p.entropy.scores = computed_scores.bytes.data();
        p.input = computed_scores.elements;
    }

    void compute_scores() {  // which other launches expect in place
        Result result(*this);
        run_loss(result, true);
    }

    template <class Body>
    void for_rows(Body body) {
        for (std::int64_t n = 0; n < rows; ++n) body(n, n / p.inner, n % p.inner);
    }

    void fill() {
        const double offset = random.uniform(-3, 3);
        const bool constant = random.one_in(6);
        for (double x = 0; x < double(groups); ++x) class_weight.set(std::int64_t(x), random.uniform(0, 2));
        for (int t = 0; t < tasks; ++t) pos_weight.set(t, random.uniform(0.5, 2));
        for (int t = 0; t < 2; ++t) threshold.set(t, random.uniform(0.3, 2));
        for_rows([&](std::int64_t n, std::int64_t o, std::int64_t i) {
            for (int c = 0; c < input_width(); ++c) {
                const double x = constant ? 1.25 : offset + random.bell();
                const bool bad = random.one_in(entropy ? int(40 * groups) : 40);
                input.set(input.elements.stride.at(o, i) + c, bad ? (random.one_in(2) ? kNaN : HUGE_VAL) : x);
            }
            double y = 0;
            if (is_class(statistic))
                y = random.one_in(9) ? double(p.ignore_index) : random.below(int(groups));
            else if (is_binary(statistic))
                y = target.elements.type == ElementType::kUInt8 ? random.below(2) : label();
            else
                y = offset + random.bell();
            target.set(target.elements.stride.at(o, i), y);
            sample_weight.set(n, random.uniform(0, 2));
            values.set(n, random.uniform(0, 3));
            upstream.set(n, random.uniform(-1, 1));
        });
    }

    double label() {  // missing, soft or hard
        return random.one_in(9) ? kNaN : random.one_in(3) ? random.uniform(0, 1) : random.below(2);
    }

    double stored_threshold(std::int64_t group) {
        if (group < 0) return kNaN;
        const std::int64_t which = group % p.num_thresholds;
        return p.threshold.data ? threshold.get(which) : p.thresholds[which];
    }

    void compute_naive() {
        naive.assign(std::size_t(rows), {});
        moments.assign(std::size_t(groups), {});
        for_rows([&](std::int64_t n, std::int64_t o, std::int64_t i) { naive[n] = naive_row(n, o, i); });
        for (const ZRow& row : naive)
            if (row.group >= 0 && std::isfinite(row.score))
                moments[row.group].count += 1, moments[row.group].mean += row.score;
        for (ZMoments& m : moments) m.mean /= std::fmax(m.count, Real(1));
        for (const ZRow& row : naive) {
            if (row.group < 0 || !std::isfinite(row.score)) continue;
            const Real d = row.score - moments[row.group].mean;
            moments[row.group].m2 += d * d;
        }
    }

    ZRow naive_row(std::int64_t n, std::int64_t o, std::int64_t i) {
        ZRow row;
        const double y = target.get(target.elements.stride.at(o, i));
        if (is_class(statistic))
            row.group = y == double(p.ignore_index) ? -1 : std::int64_t(y);
        else if (is_binary(statistic))
            row.group = std::isnan(y) ? -1 : 2 * (n % tasks) + (y > 0.5 ? 1 : 0);
        else
            row.group = n % tasks;
        if (row.group < 0) return row;
        const double x = entropy ? entropy_of(n, o, i, row.group)
                                 : input.get(input.elements.stride.at(o, i) + (gathers ? row.group : 0));
        const double sigmoid = 1 / (1 + std::exp(-x));
        switch (statistic) {
            case Statistic::kClassProb: row.score = std::exp(-x); break;
            case Statistic::kBceProb: row.score = std::isfinite(x) ? sigmoid : x; break;
            case Statistic::kMseTarget: row.score = y; break;
            case Statistic::kMseLoss: row.score = (x - y) * (x - y); break;
            case Statistic::kMseResidual: row.score = x - y; break;
            default: row.score = x;
        }
        const Real sample = p.sample_weight.data ? sample_weight.get(n) : 1.0;
        row.weight = sample;
        if (is_class(statistic)) {
            row.value = sample * values.get(n);
            if (p.class_weight.data) row.weight *= class_weight.get(row.group);
            if (weighs) row.value = row.weight * values.get(n);
        } else if (is_binary(statistic)) {
            const Real positive = p.pos_weight.data ? y * Real(pos_weight.get(n % p.num_pos_weights)) : Real(y);
            row.value = sample * (positive * log1pexp(-Real(x)) + (1 - Real(y)) * log1pexp(x));
            row.slope = sample * ((1 - Real(y)) * sigmoid - positive / (1 + std::exp(Real(x))));
        } else {
            row.value = sample * (Real(x) - y) * (Real(x) - y);
            row.slope = 2 * sample * (Real(x) - y);
        }
        return row;
    }

    // The score that the kernel has computed, compared with the cross entropy.
    double entropy_of(std::int64_t n, std::int64_t o, std::int64_t i, std::int64_t own) {
        const EntropyScores& e = p.entropy;
        const auto logit = [&](std::int64_t c) {
            const Real bias = e.logit_bias_device ? Real(bias_on_device) : Real(A(e.logit_bias));
            return Real(input.get(input.elements.stride.at(o, i) + c)) + (c == own ? bias : 0);
        };
        const Real want = cross_entropy(logit, groups, own, e.label_smoothing);
        const double got = computed_scores.get(n);
        check(std::isfinite(got) == std::isfinite(want) &&
                  (!std::isfinite(want) || near(got, want, (std::is_same_v<A, double> ? 1e-13 : 1e-5) * (10 + want))),
              "%s: row %lld: cross entropy %.9g, not %.9Lg", name.c_str(), (long long)n, got, want);
        return got;
    }

    // Scratch of a launch; partial results begin as NaN.
    struct Scratch {
        Guarded<double> partials;
        std::vector<unsigned> tickets;

        explicit Scratch(cuda::WorkShares& shares)
            : partials(layout_of(Kind::kRows, 1, shares.partial_count(), 1)), tickets(shares.ticket_count()) {
            shares.partials = partials.data();
            shares.tickets = tickets.data();
        }
    };

    struct Result {
        Guarded<std::uint8_t> mask;
        Guarded<double> scores, moments;
        Guarded<std::int64_t> kept;
        Guarded<A> row_values, row_weights, loss, denominator;

        explicit Result(const ZCase& c)
            : mask(layout_of(Kind::kRows, 1, c.rows, 1)),
              scores(mask.layout),
              moments(layout_of(Kind::kRows, 1, 3 * c.groups, 1)),
              kept(mask.layout),
              row_values(mask.layout),
              row_weights(mask.layout),
              loss(layout_of(Kind::kRows, 1, 1, 1)),
              denominator(loss.layout) {}

        bool operator==(const Result&) const = default;
        bool only_elements_written() const {
            const auto all = [](const auto&... of) { return (of.only_elements_written() && ...); };
            return all(mask, scores, moments, kept, row_values, row_weights, loss, denominator);
        }
    };

    void shuffle_launches() {
        cuda_emulation::resident = cuda_emulation::one_in(2) ? 1 : 1 + cuda_emulation::random() % 3;
        cuda_emulation::multiprocessors = 1 + cuda_emulation::random() % 3;
        cuda_emulation::room = cuda_emulation::one_in(8) ? 1 : ~0u;
        ++cuda_emulation::device;  // kernels remember what they found on the last one
    }

    ZProblem problem(Result& result) const {
        ZProblem q = p;
        q.mask = reinterpret_cast<bool*>(result.mask.data());
        q.scores = result.scores.data();
        if (is_class(statistic)) q.kept_target = result.kept.data();
        if (!is_class(statistic) && p.reduction == Reduction::kNone) q.row_values = result.row_values.data();
        if (weighs) q.row_weights = result.row_weights.data();
        q.loss = result.loss.data(), q.denominator = result.denominator.data();
        q.moments = result.moments.data();
        return q;
    }

    void run_moments(Guarded<double>& out) {
        shuffle_launches();
        cuda::WorkShares shares = cuda::shares_of_moments(p);
        Scratch scratch(shares);
        check(cuda::enqueue_class_moments(p, shares, out.data(), nullptr) == cudaSuccess &&
                  out.only_elements_written() && scratch.partials.only_elements_written(),
              "%s: class moments", name.c_str());
    }

    void run_mask(Result& result) {
        run_moments(result.moments);
        shuffle_launches();
        unsigned counters[cuda::kMaskCounters] = {};
        cuda::enqueue_z_error_mask(problem(result), counters, nullptr);
        check(result.only_elements_written() && !counters[0] && !counters[1], "%s: the mask's memory", name.c_str());
    }

    void run_loss(Result& result, bool with_moments) {
        if (!with_moments) run_moments(result.moments);
        shuffle_launches();
        ZProblem q = problem(result);
        if (with_moments) q.own_moments = result.moments.data();
        cuda::WorkShares moment_shares = cuda::shares_of_moments(q), shares = cuda::shares_of_loss(q);
        Scratch moment_scratch(moment_shares), scratch(shares);
        unsigned barriers[cuda::kLossBarriers] = {};
        check(cuda::enqueue_z_error_loss(q, moment_shares, shares, barriers, nullptr) == cudaSuccess &&
                  result.only_elements_written() && scratch.partials.only_elements_written(),
              "%s: the loss was not launched or wrote outside its outputs", name.c_str());
    }

    void test_moments() {
        Guarded<double> out(layout_of(Kind::kRows, 1, 3 * groups, 1)), again = out;
        run_moments(out);
        run_moments(again);
        check(out == again, "%s: another order of threads gives other moments", name.c_str());
        for (std::int64_t g = 0; g < groups; ++g) {
            const ZMoments& want = moments[g];
            const Real scale = 1 + std::fabs(want.mean), n = 1 + want.count;
            check(out.at(0, g) == double(want.count), "%s: group %lld: count", name.c_str(), (long long)g);
            check(std::fabs(out.at(0, groups + g) - want.mean) <= 1e-13 * scale * n,
                  "%s: group %lld: mean %.12g, not %.12Lg", name.c_str(), (long long)g, out.at(0, groups + g),
                  want.mean);
            check(std::fabs(out.at(0, 2 * groups + g) - want.m2) <= 1e-13 * n * (scale * scale + want.m2),
                  "%s: group %lld: m2 %.12g, not %.12Lg", name.c_str(), (long long)g, out.at(0, 2 * groups + g),
                  want.m2);
        }
    }

    void compare_mask(Result& result) {
        for_rows([&](std::int64_t n, std::int64_t o, std::int64_t i) {
            double z = kNaN;
            const int want = verdict(p, moments, naive[n], stored_threshold(naive[n].group), z),
                      got = result.mask.at(0, n);
            check(want < 0 ? got <= 1 : got == want, "%s: row %lld kept: %d, not %d (z = %g)", name.c_str(),
                  (long long)n, got, want, z);
            const double score = result.scores.at(0, n);
            check(near(score, z, 1e-5 * (1 + std::fabs(z))), "%s: row %lld: score %.9g, not %.9g", name.c_str(),
                  (long long)n, score, z);
            if (!is_class(statistic)) return;
            const double y =
                naive[n].group >= 0 && !got ? double(p.ignore_index) : target.get(target.elements.stride.at(o, i));
            check(double(result.kept.at(0, n)) == y, "%s: row %lld: kept target %lld", name.c_str(), (long long)n,
                  (long long)result.kept.at(0, n));
        });
    }

    void compare_loss(Result& result) {
        Real value = 0, weight = 0, size = 0;
        for_rows([&](std::int64_t n, std::int64_t, std::int64_t) {
            const bool kept = result.mask.at(0, n);
            if (weighs)
                check(near(result.row_weights.at(0, n), kept ? naive[n].weight : 0, 1e-6), "%s: row %lld: weight %.9g",
                      name.c_str(), (long long)n, double(result.row_weights.at(0, n)));
            if (kept) value += naive[n].value, weight += naive[n].weight, size += std::fabs(naive[n].value);
            if (is_class(statistic) || p.reduction != Reduction::kNone) return;
            const Real want = kept ? naive[n].value : 0;
            check(near(result.row_values.at(0, n), want, 1e-5 * (1 + std::fabs(want))),
                  "%s: row %lld: value %.9g, not %.9Lg", name.c_str(), (long long)n, double(result.row_values.at(0, n)),
                  want);
        });
        check(std::fabs(result.denominator.at(0, 0) - weight) <= 1e-6 * weight, "%s: denominator %.9g, not %.9Lg",
              name.c_str(), double(result.denominator.at(0, 0)), weight);
        if (p.reduction == Reduction::kNone) return;
        const Real divisor = p.reduction == Reduction::kMean ? (weight == 0 ? Real(HUGE_VAL) : weight) : 1;
        check(near(result.loss.at(0, 0), value / divisor, 1e-5 * size / divisor), "%s: loss %.9g, not %.9Lg",
              name.c_str(), double(result.loss.at(0, 0)), value / divisor);
    }

    void test_gradient(Result& result) {
        const bool mean = p.reduction == Reduction::kMean;
        Column grad(input.elements.type, {}, rows);
        ZProblem q = problem(result);
        q.upstream = upstream.elements;
        if (p.reduction != Reduction::kNone) q.upstream.stride = {0, 0};
        if (mean) q.divisor = result.denominator.data();
        q.grad = grad.bytes.data();
        shuffle_launches();
        check(cuda::enqueue_z_error_gradient(q, nullptr) == cudaSuccess, "%s: gradient", name.c_str());
        const ElementType type = input.elements.type;
        const double stored = type == ElementType::kFloat16 ? 1e-3 : (type == ElementType::kBFloat16 ? 8e-3 : 1e-5);
        for_rows([&](std::int64_t n, std::int64_t, std::int64_t) {
            const Real divisor = mean ? Real(result.denominator.at(0, 0)) : 1;
            const Real above = upstream.get(p.reduction == Reduction::kNone ? n : 0);
            const bool kept = result.mask.at(0, n) && divisor != 0;
            const Real want = kept ? above * naive[n].slope / divisor : 0, got = grad.get(n);
            const Real tolerance = stored * std::fabs(want) + 1e-6 / (divisor == 0 ? 1 : std::fmin(divisor, Real(1)));
            check(near(got, want, tolerance), "%s: row %lld: gradient %.9Lg, not %.9Lg", name.c_str(), (long long)n,
                  got, want);
        });
    }

    Random& random;
    const std::string name;
    const std::int64_t rows;
    const Statistic statistic;
    const int tasks;
    const std::int64_t groups;
    const bool entropy, gathers, weighs = is_class(statistic) && random.one_in(2);
    const std::int64_t outer;
    const A bias_on_device = A(0.75);
    Column input, target, computed_scores, sample_weight, values, class_weight, pos_weight, threshold, upstream;
    ZProblem p;
    std::vector<ZRow> naive;
    std::vector<ZMoments> moments;
};

}  // namespace fused_losses_test
