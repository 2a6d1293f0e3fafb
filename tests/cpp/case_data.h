// One random problem for the CPU kernels: its data and its options.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "core/numeric.h"
#include "cpu/kernels.h"
#include "cpu/tiling.h"
#include "guarded.h"
#include "losses/names.h"
#include "losses/needs.h"
#include "losses/stats_count.h"
#include "naive_losses.h"

namespace fused_losses_test {

using namespace fused_losses;

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

template <class Stored>
class CaseData {
public:
    // more_labels: whether a softmax loss may have a soft target, or two labels a row.
    CaseData(const Shape& s, int loss, const Params& loss_params, Random& r, bool more_labels)
        : shape(s),
          random(r),
          naive(naive_loss(loss_names()[loss])),
          soft((loss == kCrossEntropy || (more_labels && needs_of(loss).takes_probabilities && is_small(s))) &&
               random.one_in(3)),
          mixes(!soft && more_labels && needs_of(loss).takes_probabilities && random.one_in(4)),
          exact(needs_of(loss).has_margin),
          logits(maybe_aligned(layout_of(s.kind, s.outer, s.inner, s.classes))),
          target64(per_row()),
          target32(per_row()),
          target16(per_row()),
          target8(per_row()),
          other32(per_row()),
          lam(per_row()),
          soft_acc(any_layout()),
          soft_stored(any_layout()),
          class_weight(layout_of(Kind::kRows, 1, 1, s.classes)),
          margin(layout_of(Kind::kRows, 1, 1, s.classes)),
          sample_weight(per_row()),
          upstream(per_row()),
          scalars(layout_of(Kind::kRows, 1, 1, 4)) {
        p.dtype = P::dtype;
        p.outer = s.outer, p.inner = s.inner, p.num_classes = s.classes;
        p.loss = loss;
        p.reduction = mixes ? Reduction::kSum : Reduction(random.below(4));  // the kernels deliver the same for each
        // As the operators hand them on: kernels that compute in floats get numbers that are rounded to floats.
        std::transform(loss_params.begin(), loss_params.end(), p.params, [](double x) { return double(A(x)); });
        derive_params(p.loss, p.params);
        choose_class_factors();
        p.logits = logits.data() + logits.layout.begin;
        set_strides(layout_of(s.kind, s.outer, s.inner, s.classes), p.logits_stride, p.logits_class_stride);
        choose_weights();
        soft ? fill_soft_target() : choose_targets();
        choose_scale();
        choose_margins();
        fill_logits();
    }

protected:
    using A = acc_t<Stored>;
    using P = Precision<Stored>;

    struct Inputs {
        Guarded<Stored> logits;
        Guarded<std::int64_t> target64;
        Guarded<std::int32_t> target32;
        Guarded<std::int16_t> target16;
        Guarded<std::uint8_t> target8;
        Guarded<std::int32_t> other32;
        Guarded<A> lam, soft_acc, class_weight, margin, sample_weight, upstream, scalars;
        Guarded<Stored> soft_stored;

        bool operator==(const Inputs&) const = default;
    };

    Inputs inputs() const {
        return {logits,   target64,     target32, target16,      target8,  other32, lam,
                soft_acc, class_weight, margin,   sample_weight, upstream, scalars, soft_stored};
    }

    Layout per_row() {
        return layout_of(random.one_in(2) ? Kind::kRows : Kind::kEveryOther, shape.outer, shape.inner, 1);
    }
    // Guarded memory begins an element after a boundary of 16 bytes.
    Layout maybe_aligned(Layout layout) {
        if (random.one_in(2)) layout.begin = 16 / sizeof(Stored) - 1;
        return layout;
    }
    Layout any_layout() { return layout_of(Kind(random.below(kKinds)), shape.outer, shape.inner, shape.classes); }
    static void set_strides(const Layout& layout, RowStride& row, std::int64_t& cls) {
        row = layout.row, cls = layout.cls;
    }

    template <class Body>
    void for_rows(Body body) {
        for (std::int64_t o = 0; o < shape.outer; ++o)
            for (std::int64_t i = 0; i < shape.inner; ++i) body(o, i);
    }

    void choose_class_factors() {
        p.class_factors = class_factors_of(p.loss, p.params, soft);
        p.stats_count = mixes ? 0 : stats_count_of(p.loss, p.class_factors);
    }

    // Whether a loss of every class can be computed for every class.
    static bool is_small(const Shape& s) { return s.classes <= 101 && s.outer * s.inner <= 66; }

    // Rounded where a test needs exact arithmetic.
    double number(double x) const {
        if (!exact) return x;
        const double steps = std::is_same_v<Stored, A> ? 16 : 4;
        return std::nearbyint(x * steps) / steps;
    }

    // One for all classes or one of each, in place of params[0].
    void choose_margins() {
        for (int c = 0; c < shape.classes; ++c) margin.at(0, 0, c) = A(number(random.uniform(0, 3)));
        if (!exact || random.one_in(3)) return;
        p.first_param = margin.data();
        p.first_param_stride = random.below(2);
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

    // Second labels, whether the first ones are ignored or not, and what the losses of either are multiplied by.
    void choose_second_labels() {
        fill_target(target32, IndexType::kInt32);
        p.other_target = other32.data(), p.other_target_stride = other32.layout.row;
        p.lam_of_all = double(A(random.uniform(0, 1)));
        for_rows([&](std::int64_t o, std::int64_t i) {
            other32.at(o, i) = random.one_in(4) ? int(p.ignore_index) : random.below(int(shape.classes));
            if (p.ignore_index == -7 && other32.at(o, i) < 0) other32.at(o, i) = 0;
            lam.at(o, i) = A(random.one_in(5) ? random.below(2) : random.uniform(0, 1));
        });
        if (random.one_in(2)) p.lam = lam.data(), p.lam_stride = lam.layout.row;
        for (double& scale : p.label_scale) scale = random.one_in(2) ? 1.0 : double(A(random.uniform(0, 1)));
    }

    void choose_targets() {
        if (mixes) return choose_second_labels();
        switch (random.below(4)) {
            case 0: fill_target(target64, IndexType::kInt64); break;
            case 1: fill_target(target32, IndexType::kInt32); break;
            case 2: fill_target(target16, IndexType::kInt16); break;
            default: fill_target(target8, IndexType::kUInt8);
        }
        if (random.one_in(2)) return;
        bias = double(A(number(random.uniform(-1, 4))));
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

    bool ignored(std::int64_t o, std::int64_t i) {
        const bool of_other = !mixes || other32.at(o, i) == p.ignore_index;
        return !soft && of_other && target_of(o, i) == p.ignore_index;
    }

    // A label of a row, and what its loss is multiplied by.
    struct Label {
        std::int64_t cls;
        double factor;
    };
    std::vector<Label> labels_of(std::int64_t o, std::int64_t i) {
        if (!mixes) return {{target_of(o, i), 1.0}};
        const double first = p.lam ? double(lam.at(o, i)) : p.lam_of_all;
        const Label both[] = {{target_of(o, i), first * p.label_scale[0]},
                              {other32.at(o, i), (1 - first) * p.label_scale[1]}};
        std::vector<Label> counted;
        for (const Label& label : both)
            if (label.cls != p.ignore_index) counted.push_back(label);
        return counted;
    }

    void fill_soft_target() {
        p.soft_target_is_stored = random.one_in(2);
        p.soft_target = p.soft_target_is_stored ? static_cast<void*>(soft_stored.data()) : soft_acc.data();
        set_strides(p.soft_target_is_stored ? soft_stored.layout : soft_acc.layout, p.soft_target_stride,
                    p.soft_target_class_stride);
        const bool few = random.one_in(2);
        for_rows([&](std::int64_t o, std::int64_t i) {
            for (int c = 0; c < shape.classes; ++c) {
                const bool none = few && !random.one_in(8);
                const A share = A(none ? 0 : random.uniform(0, 2.0 / double(shape.classes)));
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

    // Whether the loss of a row may be finite with class 0 at -inf.
    bool may_be_masked() const {
        const ClassFactors of_label = class_factors_of(p.loss, p.params, /*soft_target=*/false);
        if (of_label == ClassFactors::kOnes) return false;
        if (soft || of_label != ClassFactors::kNone) return p.class_weight;
        return naive.masks && (!naive.masks_with || naive.masks_with(p.params));
    }

    void fill_logits() {
        const double spread = random.one_in(2) ? 1 : 4, offset = random.uniform(-20, 20);
        const bool maskable = shape.classes > 1 && may_be_masked();
        for_rows([&](std::int64_t o, std::int64_t i) {
            bool masked = maskable && random.one_in(6);
            if (!soft)
                for (const Label& label : labels_of(o, i)) masked &= label.cls != 0;
            for (int c = 0; c < shape.classes; ++c) {
                const double z = masked && c == 0 ? -HUGE_VAL : number(offset + spread * random.bell());
                logits.at(o, i, c) = narrow<Stored>(A(ignored(o, i) ? std::nan("") : z));
            }
        });
    }

    const Shape shape;
    Random& random;
    const NaiveLoss& naive;
    const bool soft;
    const bool mixes;  // two labels a row
    const bool exact;  // numbers are few bits long and sums of them exact: errors may tie with the threshold
    double bias = 0;
    Guarded<Stored> logits;
    Guarded<std::int64_t> target64;
    Guarded<std::int32_t> target32;
    Guarded<std::int16_t> target16;
    Guarded<std::uint8_t> target8;
    Guarded<std::int32_t> other32;
    Guarded<A> lam, soft_acc;
    Guarded<Stored> soft_stored;
    Guarded<A> class_weight, margin, sample_weight, upstream, scalars;
    RowProblem p;
};

}  // namespace fused_losses_test
