// One random problem for the CPU kernels: its data, its options, and the comparison with naive_losses.h.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "core/numeric.h"
#include "cpu/kernels.h"
#include "guarded.h"
#include "losses/registry.h"
#include "naive_losses.h"

namespace fused_losses_test {

using namespace fused_losses;

inline CpuKernels kernels = {};  // those under test

// Relative errors: of what is computed, of what is stored; and half of the smallest number that can be stored.
template <class Stored>
struct Precision;
template <>
struct Precision<double> {
    static constexpr Dtype dtype = Dtype::kFloat64;
    static constexpr double computed = 1e-12, stored = 0, smallest = 0;
};
template <>
struct Precision<float> {
    static constexpr Dtype dtype = Dtype::kFloat32;
    static constexpr double computed = 1e-5, stored = 0, smallest = 0;
};
template <>
struct Precision<Half> {
    static constexpr Dtype dtype = Dtype::kFloat16;
    static constexpr double computed = 1e-5, stored = 0x1p-11, smallest = 0x1p-25;
};
template <>
struct Precision<BFloat16> {
    static constexpr Dtype dtype = Dtype::kBFloat16;
    static constexpr double computed = 1e-5, stored = 0x1p-8, smallest = 0;
};

struct Shape {
    Kind kind;
    std::int64_t outer, inner, classes;
};

struct Outputs {
    bool values, stats, grad;
};

// One problem with random data and options.
template <class Stored>
class Case {
    using A = acc_t<Stored>;
    using P = Precision<Stored>;

public:
    Case(const Shape& s, int loss, const Params& loss_params, Random& r)
        : shape(s),
          random(r),
          naive(naive_loss(loss_names()[loss])),
          soft(!naive.value && random.one_in(3)),
          logits(layout_of(s.kind, s.outer, s.inner, s.classes)),
          target64(per_row()),
          target32(per_row()),
          target16(per_row()),
          target8(per_row()),
          soft_acc(any_layout()),
          soft_stored(any_layout()),
          class_weight(layout_of(Kind::kRows, 1, 1, s.classes)),
          sample_weight(per_row()),
          upstream(per_row()),
          scalars(layout_of(Kind::kRows, 1, 1, 2)) {
        p.dtype = P::dtype;
        p.outer = s.outer, p.inner = s.inner, p.num_classes = s.classes;
        p.loss = loss;
        for (std::size_t k = 0; k < loss_params.size(); ++k) p.params[k] = double(A(loss_params[k]));
        visit_loss(SoftmaxLosses{}, loss, [&]<class Loss>() { p.needs_sum = soft || Loss::needs_sum(p.params); });
        p.logits = logits.data();
        set_strides(layout_of(s.kind, s.outer, s.inner, s.classes), p.logits_stride, p.logits_class_stride);
        choose_weights();
        soft ? fill_soft_target() : choose_targets();
        choose_scale();
        fill_logits();
    }

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

    struct Inputs {
        Guarded<Stored> logits;
        Guarded<std::int64_t> target64;
        Guarded<std::int32_t> target32;
        Guarded<std::int16_t> target16;
        Guarded<std::uint8_t> target8;
        Guarded<A> soft_acc, class_weight, sample_weight, upstream, scalars;
        Guarded<Stored> soft_stored;

        bool operator==(const Inputs&) const = default;
    };

    struct Result {
        Guarded<A> values, stats;
        Guarded<Stored> grad;
        Layout grad_layout;
        Guarded<double> sums;

        Result(const Layout& grad, const RowProblem& p)
            : values(layout_of(Kind::kRows, p.outer, p.inner, 1)),
              stats(layout_of(Kind::kRows, p.stats_count(), p.rows(), 1)),
              grad(grad),
              grad_layout(grad),
              sums(layout_of(Kind::kRows, 1, Tiling(p).tiles, 1)) {}

        bool operator==(const Result& other) const {
            return values == other.values && stats == other.stats && grad == other.grad && sums == other.sums;
        }
    };

    Layout per_row() {
        return layout_of(random.one_in(2) ? Kind::kRows : Kind::kEveryOther, shape.outer, shape.inner, 1);
    }
    Layout any_layout() { return layout_of(Kind(random.below(kKinds)), shape.outer, shape.inner, shape.classes); }
    Inputs inputs() const {
        return {logits,       target64,      target32, target16, target8,    soft_acc,
                class_weight, sample_weight, upstream, scalars,  soft_stored};
    }

    static void set_strides(const Layout& layout, RowStride& row, std::int64_t& cls) {
        row = layout.row, cls = layout.cls;
    }

    template <class Body>
    void for_rows(Body body) {
        for (std::int64_t o = 0; o < shape.outer; ++o)
            for (std::int64_t i = 0; i < shape.inner; ++i) body(o, i);
    }

    // Class 0 may have weight zero: then an infinite logit of it must not matter to a sum over classes.
    void choose_weights() {
        if (random.one_in(2)) return;
        p.class_weight = class_weight.data();
        for (int c = 0; c < shape.classes; ++c) class_weight.at(0, 0, c) = c == 0 ? A(0) : A(random.uniform(0.1, 2));
    }

    template <class Index>
    void fill_target(Guarded<Index>& target, IndexType type) {
        p.index_type = type;
        p.target = target.data();
        p.target_stride = target.layout.row;
        const std::int64_t largest = std::min<std::int64_t>(shape.classes, type == IndexType::kUInt8 ? 256 : 32768);
        const bool may_ignore = random.one_in(2);
        p.ignore_index = random.one_in(2) ? 0 : (type == IndexType::kUInt8 ? 255 : -100);
        if (!may_ignore) p.ignore_index = -7;
        for_rows([&](std::int64_t o, std::int64_t i) {
            const bool ignore = may_ignore && random.one_in(4);
            target.at(o, i) = static_cast<Index>(ignore ? p.ignore_index : random.below(int(largest)));
        });
    }

    void choose_targets() {
        switch (random.below(4)) {
            case 0: fill_target(target64, IndexType::kInt64); break;
            case 1: fill_target(target32, IndexType::kInt32); break;
            case 2: fill_target(target16, IndexType::kInt16); break;
            default: fill_target(target8, IndexType::kUInt8);
        }
        if (random.one_in(2)) return;
        bias = double(A(random.uniform(-1, 4)));
        p.logit_bias = random.one_in(2) ? bias : 0.0;
        if (p.logit_bias != 0) return;
        scalars.at(0, 0, 0) = A(bias);
        p.logit_bias_device = &scalars.at(0, 0, 0);
    }

    std::int64_t target_of(std::int64_t o, std::int64_t i) {
        switch (p.index_type) {
            case IndexType::kInt32: return target32.at(o, i);
            case IndexType::kInt16: return target16.at(o, i);
            case IndexType::kUInt8: return target8.at(o, i);
            default: return target64.at(o, i);
        }
    }

    bool ignored(std::int64_t o, std::int64_t i) { return !soft && target_of(o, i) == p.ignore_index; }

    void fill_soft_target() {
        p.soft_target_is_stored = random.one_in(2);
        p.soft_target = p.soft_target_is_stored ? static_cast<void*>(soft_stored.data()) : soft_acc.data();
        set_strides(p.soft_target_is_stored ? soft_stored.layout : soft_acc.layout, p.soft_target_stride,
                    p.soft_target_class_stride);
        for_rows([&](std::int64_t o, std::int64_t i) {
            for (int c = 0; c < shape.classes; ++c) {
                const A share = A(random.uniform(0, 2.0 / double(shape.classes)));
                soft_acc.at(o, i, c) = share;
                soft_stored.at(o, i, c) = narrow<Stored>(share);
            }
        });
    }

    double soft_of(std::int64_t o, std::int64_t i, int c) {
        return p.soft_target_is_stored ? double(widen(soft_stored.at(o, i, c))) : double(soft_acc.at(o, i, c));
    }

    // What an ignored row carries is arbitrary: NaN.
    void choose_scale() {
        const A nan = std::numeric_limits<A>::quiet_NaN();
        for_rows([&](std::int64_t o, std::int64_t i) {
            sample_weight.at(o, i) = ignored(o, i) ? nan : A(random.uniform(0, 2));
            upstream.at(o, i) = ignored(o, i) ? nan : A(random.uniform(-1, 1));
        });
        if (random.one_in(2)) p.sample_weight = sample_weight.data(), p.sample_weight_stride = sample_weight.layout.row;
        if (random.one_in(2)) {
            p.upstream = upstream.data();
            if (random.one_in(2) && p.rows() > 0)
                upstream.at(0, 0) = A(0.75);  // one for all rows: both strides stay 0
            else
                p.upstream_stride = upstream.layout.row;
        }
        if (random.one_in(2)) {
            scalars.at(0, 0, 1) = random.one_in(5) ? A(0) : A(random.uniform(1, 5));
            p.denominator = &scalars.at(0, 0, 1);
        }
    }

    void fill_logits() {
        const double spread = random.one_in(2) ? 1 : 4, offset = random.uniform(-20, 20);
        for_rows([&](std::int64_t o, std::int64_t i) {
            const bool masked = random.one_in(6) && shape.classes > 1 &&
                                (p.needs_sum ? p.class_weight != nullptr : true) && (soft || target_of(o, i) != 0);
            for (int c = 0; c < shape.classes; ++c) {
                const double z = masked && c == 0 ? -HUGE_VAL : offset + spread * random.bell();
                logits.at(o, i, c) = narrow<Stored>(A(ignored(o, i) ? std::nan("") : z));
            }
        });
    }

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
            if (soft) row.soft.push_back(soft_of(o, i, c));
        }
        return naive_row(naive, p.params, row);
    }

    void compare(Result& result, const char* pass, bool values) {
        double total = 0, sums = 0, size = 0;
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
            total += value, size += sample * tolerance + P::computed * std::fabs(value);
            if (values)
                check(std::fabs(double(result.values.at(o, i)) - value) <=
                          sample * tolerance + P::computed * std::fabs(value),
                      "%s: value %.9g, not %.9g", name.c_str(), double(result.values.at(o, i)), value);
            compare_gradient(result, pass, o, i, want, sample, tolerance);
        });
        for (std::int64_t t = 0; t < Tiling(p).tiles; ++t) sums += result.sums.at(0, t);
        check(std::fabs(sums - total) <= size, "%s: %s: sum %.9g, not %.9g", name.c_str(), pass, sums, total);
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

    const Shape shape;
    Random& random;
    const NaiveLoss& naive;
    const bool soft;
    std::string name;
    double bias = 0;
    std::vector<NaiveResult> expected;  // of each row
    Guarded<Stored> logits;
    Guarded<std::int64_t> target64;
    Guarded<std::int32_t> target32;
    Guarded<std::int16_t> target16;
    Guarded<std::uint8_t> target8;
    Guarded<A> soft_acc;
    Guarded<Stored> soft_stored;
    Guarded<A> class_weight, sample_weight, upstream, scalars;
    RowProblem p;
};

}  // namespace fused_losses_test
