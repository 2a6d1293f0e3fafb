// A random problem for the CPU kernels, run in several ways and compared with naive_losses.h.
#pragma once

#include "case_data.h"

namespace fused_losses_test {

inline CpuKernels kernels = {};  // those under test

struct Outputs {
    bool values, stats, grad;
};

// One problem with random data and options.
template <class Stored>
class Case : CaseData<Stored> {
    using Base = CaseData<Stored>;
    using Base::any_layout, Base::for_rows, Base::ignored, Base::inputs, Base::set_strides, Base::soft_of,
        Base::target_of;
    using Base::logits, Base::class_weight, Base::margin, Base::sample_weight, Base::upstream, Base::scalars;
    using Base::shape, Base::random, Base::naive, Base::soft, Base::bias, Base::p;
    using typename Base::A, typename Base::P, typename Base::Inputs;

public:
    using Base::Base;

    void test(const std::string& what) {
        name = what + (soft ? " soft" : "");
        const Layout grad_layout = any_layout();
        const Inputs before = inputs();
        compute_expected();
        Result whole(grad_layout, p), pieces(grad_layout, p), from_stats(grad_layout, p), again(grad_layout, p);
        paint_byte = kUnwritten;
        forward(whole, {true, true, true}, 1);
        paint_byte = 0x41;
        forward(pieces, {true, true, true}, 1 + random.below(5));
        check(whole == pieces, "%s: pieces of the range give other bits", name.c_str());
        forward(from_stats, {false, true, false}, 1);
        backward(from_stats, 1);
        paint_byte = kUnwritten;
        again.stats = from_stats.stats, again.sums = from_stats.sums;
        backward(again, 1 + random.below(5));
        check(from_stats == again, "%s: backward of pieces gives other bits", name.c_str());
        check(before == inputs(), "%s: an input was written to", name.c_str());
        compare(whole, "forward", true);
        compare(from_stats, "backward", false);
    }

    // NaN or +inf makes its own row not finite and changes no bit of any other row.
    void test_isolation(const std::string& what) {
        name = what;
        if (p.rows() == 0) return;
        const std::int64_t bad_o = random.below(int(p.outer)), bad_i = random.below(int(p.inner));
        if (ignored(bad_o, bad_i)) return;
        const Layout grad_layout = any_layout();
        Result clean(grad_layout, p), poisoned(grad_layout, p);
        forward(clean, {true, true, true}, 1);
        logits.at(bad_o, bad_i, random.below(int(shape.classes))) =
            narrow<Stored>(random.one_in(2) ? std::numeric_limits<A>::infinity() : std::numeric_limits<A>::quiet_NaN());
        forward(poisoned, {true, true, true}, 1);
        for_rows([&](std::int64_t o, std::int64_t i) {
            const bool bad = o == bad_o && i == bad_i;
            bool same = same_bits(clean.values.at(o, i), poisoned.values.at(o, i)), finite = true;
            for (int c = 0; c < shape.classes; ++c) {
                same &= same_bits(clean.grad.at(o, i, c), poisoned.grad.at(o, i, c));
                finite &= bool(std::isfinite(widen(poisoned.grad.at(o, i, c))));
            }
            finite |= bool(std::isfinite(poisoned.values.at(o, i)));
            check(bad ? !finite : same, "%s: row %lld, %lld beside a poisoned one", name.c_str(), (long long)o,
                  (long long)i);
        });
    }

private:
    template <class T>
    static bool same_bits(const T& a, const T& b) {
        return std::memcmp(&a, &b, sizeof(T)) == 0;
    }

    struct Result {
        Guarded<A> values, stats;
        Guarded<Stored> grad;
        Layout grad_layout;
        Guarded<TileSums> sums;

        Result(const Layout& grad, const RowProblem& p)
            : values(layout_of(Kind::kRows, p.outer, p.inner, 1)),
              stats(layout_of(Kind::kRows, p.stats_count, p.rows(), 1)),
              grad(grad),
              grad_layout(grad),
              sums(layout_of(Kind::kRows, 1, Tiling(p).tiles, 1)) {}

        bool operator==(const Result& other) const {
            return values == other.values && stats == other.stats && grad == other.grad && sums == other.sums;
        }
    };

    // Runs body(begin, end) on consecutive pieces of all tiles, the last piece first.
    template <class Body>
    void in_pieces(int pieces, Body body) {
        const std::int64_t tiles = Tiling(p).tiles;
        for (int k = pieces - 1; k >= 0; --k) {
            paint_stack();
            body(tiles * k / pieces, tiles * (k + 1) / pieces);
        }
    }

    void point_to(Result& result, const Outputs& wanted) {
        p.row_values = wanted.values ? result.values.data() : nullptr;
        p.stats = wanted.stats ? result.stats.data() : nullptr;
        p.grad = wanted.grad ? result.grad.data() : nullptr;
        set_strides(result.grad_layout, p.grad_stride, p.grad_class_stride);
    }

    void forward(Result& result, const Outputs& wanted, int pieces) {
        point_to(result, wanted);
        in_pieces(pieces,
                  [&](std::int64_t begin, std::int64_t end) { kernels.forward(p, begin, end, result.sums.data()); });
        check(result.values.only_elements_written() && result.stats.only_elements_written() &&
                  result.grad.only_elements_written() && result.sums.only_elements_written(),
              "%s: forward wrote outside its outputs", name.c_str());
    }

    void backward(Result& result, int pieces) {
        point_to(result, {false, true, true});
        const Guarded<A> stats = result.stats;
        in_pieces(pieces, [&](std::int64_t begin, std::int64_t end) { kernels.gradient(p, begin, end); });
        check(result.grad.only_elements_written() && result.stats == stats, "%s: backward wrote outside its output",
              name.c_str());
    }

    void compute_expected() {
        for_rows([&](std::int64_t o, std::int64_t i) {
            expected.push_back(ignored(o, i) ? NaiveResult{} : naive_result(o, i));
        });
    }

    NaiveResult naive_result(std::int64_t o, std::int64_t i) {
        NaiveRow row;
        row.y = soft ? 0 : int(target_of(o, i));
        for (int c = 0; c < shape.classes; ++c) {
            row.logits.push_back(Real(widen(logits.at(o, i, c))) + (!soft && c == row.y ? bias : 0));
            if (p.class_weight) row.weight.push_back(double(class_weight.at(0, 0, c)));
            if (p.margin) row.margin.push_back(double(margin.data()[c * p.margin_stride]));
            if (soft) row.soft.push_back(soft_of(o, i, c));
        }
        return naive_row(naive, p.params, row);
    }

    void compare(Result& result, const char* pass, bool values) {
        TileSums total, size, sums;
        for_rows([&](std::int64_t o, std::int64_t i) {
            if (ignored(o, i)) {
                check(!values || result.values.at(o, i) == A(0), "%s: an ignored row has a value", name.c_str());
                for (int c = 0; c < shape.classes; ++c)
                    check(widen(result.grad.at(o, i, c)) == 0, "%s: %s: an ignored row has a gradient", name.c_str(),
                          pass);
                return;
            }
            const NaiveResult& want = expected[o * shape.inner + i];
            const double sample = p.sample_weight ? double(sample_weight.at(o, i)) : 1.0;
            const double value = sample * double(want.value);
            const double tolerance = P::computed * condition(naive, p.params) * (2 + double(want.magnitude));
            total.value += value, size.value += sample * tolerance + P::computed * std::fabs(value);
            add_active(o, i, want.value, sample, total, size);
            if (values)
                check(std::fabs(double(result.values.at(o, i)) - value) <=
                          sample * tolerance + P::computed * std::fabs(value),
                      "%s: value %.9g, not %.9g", name.c_str(), double(result.values.at(o, i)), value);
            compare_gradient(result, pass, o, i, want, sample, tolerance);
        });
        for (std::int64_t t = 0; t < Tiling(p).tiles; ++t)
            sums.value += result.sums.at(0, t).value, sums.weight += result.sums.at(0, t).weight;
        check(std::fabs(sums.value - total.value) <= size.value, "%s: %s: sum %.9g, not %.9g", name.c_str(), pass,
              sums.value, total.value);
        check(std::fabs(sums.weight - total.weight) <= size.weight + 1e-12 * total.weight,
              "%s: %s: weight of active rows %.9g, not %.9g", name.c_str(), pass, sums.weight, total.weight);
    }

    // Adds a row's weight if its loss is positive; a loss near zero may be rounded to either side. Only losses of
    // several passes count rows.
    void add_active(std::int64_t o, std::int64_t i, Real value, double sample, TileSums& total, TileSums& size) {
        if (!is_pass_loss(p.loss)) return;
        const double weight = sample * (p.class_weight ? double(class_weight.at(0, 0, target_of(o, i))) : 1.0);
        const bool near_zero = !is_margin_loss(naive.name) && std::fabs(value) < 1e-5;
        (near_zero ? size : total).weight += near_zero || value > 0 ? weight : 0.0;
    }

    void compare_gradient(Result& result, const char* pass, std::int64_t o, std::int64_t i, const NaiveResult& want,
                          double sample, double tolerance) {
        const double above = !p.upstream ? 1.0 : double(upstream.data()[p.upstream_stride.at(o, i)]);
        const double denominator = p.denominator ? double(scalars.at(0, 0, 1)) : 1.0;
        const double scale = denominator == 0 ? 0.0 : sample * above / denominator;
        for (int c = 0; c < shape.classes; ++c) {
            const double got = double(widen(result.grad.at(o, i, c))), exact = scale * double(want.grad[c]);
            check(std::fabs(got - exact) <= std::fabs(scale) * tolerance + P::stored * std::fabs(exact) + P::smallest,
                  "%s: %s: gradient [%lld, %lld, %d] %.9g, not %.9g", name.c_str(), pass, (long long)o, (long long)i, c,
                  got, exact);
        }
    }

    std::string name;
    std::vector<NaiveResult> expected;  // of each row
};

}  // namespace fused_losses_test
