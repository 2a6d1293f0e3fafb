// A random problem for the CPU kernels, run in several ways and compared with naive_losses.h.
#pragma once

#include "expected_rows.h"

namespace fused_losses_test {

inline CpuKernels kernels = {};  // those under test

struct Outputs {
    bool values, stats, grad;
};

// One problem with random data and options.
template <class Stored>
class Case : ExpectedRows<Stored> {
    using Base = ExpectedRows<Stored>;
    using Base::any_layout, Base::for_rows, Base::ignored, Base::inputs, Base::set_strides, Base::target_of;
    using Base::class_weight, Base::random, Base::naive, Base::soft, Base::mixes, Base::p, Base::name;
    using Base::compute_expected, Base::expected_of, Base::sample_weight_of, Base::value_tolerance, Base::may_be_zero;
    using typename Base::A, typename Base::P, typename Base::Inputs, typename Base::RowResult;

public:
    Case(const Shape& shape, int loss, const Params& params, Random& r)
        : Base(shape, loss, params, r, /*more_labels=*/true) {}

    void test(const std::string& what) {
        name = what + (soft ? " soft" : "") + (mixes ? " mixed" : "");
        const Layout grad_layout = any_layout();
        const Inputs before = inputs();
        compute_expected();
        Result whole(grad_layout, p), pieces(grad_layout, p);
        paint_byte = kUnwritten;
        forward(whole, {true, true, true}, 1);
        paint_byte = 0x41;
        forward(pieces, {true, true, true}, 1 + random.below(5));
        check(whole == pieces, "%s: pieces of the range give other bits", name.c_str());
        compare(whole, "forward", true);
        if (p.stats_count > 0) test_backward(grad_layout);
        check(before == inputs(), "%s: an input was written to", name.c_str());
    }

    void test_isolation(const std::string& what) {
        name = what;
        Base::template check_isolation<Result>(any_layout(), [&](Result& r) { forward(r, {true, true, true}, 1); });
    }

private:
    void test_backward(const Layout& grad_layout) {
        Result from_stats(grad_layout, p), again(grad_layout, p);
        forward(from_stats, {false, true, false}, 1);
        backward(from_stats, 1);
        paint_byte = kUnwritten;
        again.stats = from_stats.stats, again.sums = from_stats.sums;
        backward(again, 1 + random.below(5));
        check(from_stats == again, "%s: backward of pieces gives other bits", name.c_str());
        compare(from_stats, "backward", false);
    }

    struct Result : RowResult {
        Guarded<LossSums> sums;

        Result(const Layout& grad, const RowProblem& p)
            : RowResult(grad, p), sums(layout_of(Kind::kRows, 1, Tiling(p).tiles, 1)) {}

        bool operator==(const Result& other) const { return RowResult::operator==(other) && sums == other.sums; }
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
        p.stats = wanted.stats && p.stats_count > 0 ? result.stats.data() : nullptr;
        p.grad = wanted.grad ? result.grad.data() : nullptr;
        set_strides(result.grad_layout, p.grad_stride, p.grad_class_stride);
    }

    void forward(Result& result, const Outputs& wanted, int pieces) {
        point_to(result, wanted);
        in_pieces(pieces,
                  [&](std::int64_t begin, std::int64_t end) { kernels.forward(p, begin, end, result.sums.data()); });
        check(result.only_elements_written() && result.sums.only_elements_written(),
              "%s: forward wrote outside its outputs", name.c_str());
    }

    void backward(Result& result, int pieces) {
        point_to(result, {false, true, true});
        const Guarded<A> stats = result.stats;
        in_pieces(pieces, [&](std::int64_t begin, std::int64_t end) { kernels.gradient(p, begin, end); });
        check(result.grad.only_elements_written() && result.stats == stats, "%s: backward wrote outside its output",
              name.c_str());
    }

    void compare(Result& result, const char* pass, bool values) {
        LossSums total{}, size{}, sums{};
        for_rows([&](std::int64_t o, std::int64_t i) {
            if (values) Base::compare_value(o, i, result.values.at(o, i));
            if (values) Base::compare_saved(result.stats, o, i);
            Base::compare_gradient(result.grad, pass, o, i);
            if (ignored(o, i)) return;
            total.value += sample_weight_of(o, i) * double(expected_of(o, i).value);
            size.value += value_tolerance(o, i);
            add_active(o, i, total, size);
        });
        for (std::int64_t t = 0; t < Tiling(p).tiles; ++t) sums.add(result.sums.at(0, t));
        check(std::fabs(sums.value - total.value) <= size.value, "%s: %s: sum %.9g, not %.9g", name.c_str(), pass,
              sums.value, total.value);
        check(std::fabs(sums.weight - total.weight) <= size.weight + 1e-12 * total.weight,
              "%s: %s: weight of active rows %.9g, not %.9g", name.c_str(), pass, sums.weight, total.weight);
    }

    // Adds a row's weight if its loss is positive. Only multi-reduction losses count rows.
    void add_active(std::int64_t o, std::int64_t i, LossSums& total, LossSums& size) {
        if (!is_multi_reduction_loss(p.loss)) return;
        const double of_class = p.class_weight ? double(class_weight.at(0, 0, target_of(o, i))) : 1.0;
        const double weight = sample_weight_of(o, i) * of_class;
        const bool either = may_be_zero(expected_of(o, i));
        (either ? size : total).weight += either || expected_of(o, i).value > 0 ? weight : 0.0;
    }
};

}  // namespace fused_losses_test
