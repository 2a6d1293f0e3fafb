// CPU, CUDA and Meta entries of the Z-Error operators: check, allocate, describe the call as a ZProblem, hand it to the
// device's driver. Nothing here differs between devices.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/row_layout.h"
#include "ops/z_error_args.h"
#include "z_error/driver.h"

namespace fused_losses {
namespace {

using at::Tensor;

ElementType element_type(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kDouble: return ElementType::kFloat64;
        case at::kFloat: return ElementType::kFloat32;
        case at::kHalf: return ElementType::kFloat16;
        case at::kBFloat16: return ElementType::kBFloat16;
        case at::kLong: return ElementType::kInt64;
        case at::kInt: return ElementType::kInt32;
        case at::kShort: return ElementType::kInt16;
        case at::kChar: return ElementType::kInt8;
        case at::kByte:
        case at::kBool: return ElementType::kUInt8;
        default: TORCH_CHECK(false, "target must not be of dtype ", t.scalar_type());
    }
}

// A vector that does not belong to rows: thresholds, weights of tasks.
Elements vector_of(const Tensor& t) {
    return {t.const_data_ptr(), element_type(t), {0, t.dim() == 0 ? 0 : t.stride(0)}};
}

// A ZProblem together with the tensors that keep its memory alive.
class Call {
public:
    // class_dim: of the logits that `input` may hold, else -1.
    Call(Statistic statistic, const Tensor& in, std::int64_t class_dim, const Tensor& labels,
         const OptionalTensor& weight = std::nullopt, const Tensor& upstream_of_rows = {},
         const Tensor& values_of_rows = {})
        : sizes(labels.sizes()), input(in), target(labels), upstream(upstream_of_rows), values(values_of_rows) {
        if (weight) sample_weight = *weight;
        p.statistic = statistic;
        p.acc_is_double = acc_of(input) == at::kDouble;
        p.device = input.device().index();
        p.gathers = class_dim >= 0;
        if (!lay_out(class_dim)) make_contiguous(class_dim);
        if (p.gathers) p.class_stride = input.stride(class_dim);
    }

    Tensor empty(at::IntArrayRef size, at::ScalarType dtype) const {
        return at::empty(size, at::TensorOptions().device(input.device()).dtype(dtype));
    }

    void follow(const ZErrorRule& rule, std::int64_t groups) {
        p.num_groups = groups;
        if (rule.moments) {
            moments = rule.moments->contiguous();
            p.moments = moments.const_data_ptr<double>();
        } else {
            moments = empty({3, groups}, at::kDouble);
            p.moments = p.own_moments = moments.mutable_data_ptr<double>();
        }
        p.tail = parse_tail(rule.tail);
        p.min_count = static_cast<double>(rule.min_count);
        p.keep_small = rule.keep_small;
        if (!rule.threshold_tensor) {
            p.num_thresholds = static_cast<std::int64_t>(rule.threshold.size());
            for (std::size_t i = 0; i < rule.threshold.size(); ++i) p.thresholds[i] = rule.threshold[i];
        } else if (rule.threshold_tensor->is_cpu() && !input.is_cpu()) {
            p.thresholds[0] = rule.threshold_tensor->item<double>();  // on the CPU already: no synchronisation
        } else {
            threshold = *rule.threshold_tensor;
            p.num_thresholds = threshold.numel();
            p.threshold = vector_of(threshold);
        }
    }

    void weigh_positives(const OptionalTensor& pos_weight) {
        if (!pos_weight) return;
        p.num_pos_weights = pos_weight->numel();
        p.pos_weight = vector_of(*pos_weight);
    }

    void weigh_classes(const OptionalTensor& weight) {
        if (weight) p.class_weight = vector_of(*weight);
    }

    Tensor new_mask() {
        const Tensor mask = empty(sizes, at::kBool);
        p.mask = mask.mutable_data_ptr<bool>();
        return mask;
    }

    Tensor new_scores(bool wanted) {
        if (!wanted) return empty({0}, at::kDouble);
        const Tensor scores = empty(sizes, at::kDouble);
        p.scores = scores.mutable_data_ptr<double>();
        return scores;
    }

    Tensor new_kept_target() {
        const Tensor kept_target = empty(sizes, at::kLong);
        p.kept_target = kept_target.mutable_data_ptr<std::int64_t>();
        return kept_target;
    }

    // The loss and what its mean is divided by.
    std::tuple<Tensor, Tensor> new_loss(std::string_view reduction, at::ScalarType acc) {
        p.reduction = parse_z_reduction(reduction);
        const bool none = p.reduction == Reduction::kNone;
        const Tensor loss = empty(none ? at::IntArrayRef(sizes) : at::IntArrayRef(), acc), denominator = empty({}, acc);
        (none ? p.row_values : p.loss) = loss.mutable_data_ptr();
        p.denominator = denominator.mutable_data_ptr();
        return {loss, denominator};
    }

    ZProblem p;
    const at::DimVector sizes;

private:
    bool lay_out(std::int64_t class_dim) {
        const RowDims of_target{&target, -1};
        const auto layout = coalesce_rows(sizes, {of_target,
                                                  {&input, class_dim},
                                                  sample_weight.defined() ? RowDims{&sample_weight, -1} : of_target,
                                                  upstream.defined() ? RowDims{&upstream, -1} : of_target,
                                                  values.defined() ? RowDims{&values, -1} : of_target});
        if (!layout) return false;
        p.outer = layout->outer;
        p.inner = layout->inner;
        const auto elements = [&](const Tensor& t, int i) {
            return t.defined() ? Elements{t.const_data_ptr(), element_type(t), layout->strides[i]} : Elements{};
        };
        p.target = elements(target, 0);
        p.input = elements(input, 1);
        p.sample_weight = elements(sample_weight, 2);
        p.upstream = elements(upstream, 3);
        p.values = elements(values, 4);
        return true;
    }

    // Rows that need more than two strides: logits are copied only if copying the small tensors does not help.
    void make_contiguous(std::int64_t class_dim) {
        target = target.contiguous();
        if (sample_weight.defined()) sample_weight = sample_weight.contiguous();
        if (upstream.defined()) upstream = upstream.contiguous();
        if (values.defined()) values = values.contiguous();
        if (lay_out(class_dim)) return;
        input = input.contiguous();
        TORCH_INTERNAL_ASSERT(lay_out(class_dim));
    }

    Tensor input, target, sample_weight, upstream, values, moments, threshold;
};

Statistic check_moments(const Tensor& score, const Tensor& target, const c10::SymInt& groups,
                        std::string_view statistic_name, std::int64_t* class_dim) {
    const Statistic statistic = parse_statistic(statistic_name);
    TORCH_CHECK_VALUE(groups >= 1, "num_classes must be at least 1, got ", groups);
    *class_dim = -1;
    if (is_class(statistic)) {
        *class_dim = check_scores(score, target, groups);
    } else {
        check_pairs(score, target, statistic);
        TORCH_CHECK_VALUE(groups_of(score, statistic) == groups, "num_classes must be ", groups_of(score, statistic),
                          " here, got ", groups);
    }
    return statistic;
}

using MaskAndMore = std::tuple<Tensor, Tensor, Tensor>;
using LossAndMore = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ClassLossAndMore = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <ZErrorDriver (*driver)()>
struct OnDevice {
    static Tensor class_moments(const Tensor& score, const Tensor& target, std::int64_t num_classes,
                                std::string_view statistic, std::int64_t ignore_index) {
        std::int64_t class_dim;
        const Statistic kind = check_moments(score, target, num_classes, statistic, &class_dim);
        Call call(kind, score, class_dim, target);
        call.p.num_groups = num_classes;
        call.p.ignore_index = ignore_index;
        const Tensor moments = call.empty({3, num_classes}, at::kDouble);
        driver().moments(call.p, moments.mutable_data_ptr<double>());
        return moments;
    }

    static MaskAndMore z_error_mask(const Tensor& score, const Tensor& target, const Tensor& moments,
                                    const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                    std::string_view tail, std::int64_t min_count, bool keep_small,
                                    std::int64_t ignore_index, bool with_scores, std::string_view statistic) {
        const OptionalTensor given(moments);
        const ZErrorRule rule{given, threshold_tensor, threshold, tail, min_count, keep_small};
        const Statistic kind = check_class_statistic(statistic);
        check_rule(rule, score, moments.sym_size(-1), /*binary=*/false);
        Call call(kind, score, check_scores(score, target, moments.sym_size(1)), target);
        call.follow(rule, moments.size(1));
        call.p.ignore_index = ignore_index;
        const Tensor mask = call.new_mask(), kept_target = call.new_kept_target();
        const Tensor scores = call.new_scores(with_scores);
        driver().mask(call.p);
        return {mask, kept_target, scores};
    }

    static ClassLossAndMore z_error_class_loss(const Tensor& values, const Tensor& score, const Tensor& target,
                                               std::int64_t num_classes, const OptionalTensor& moments,
                                               const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                               const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                               std::string_view tail, std::int64_t min_count, bool keep_small,
                                               std::int64_t ignore_index, bool with_scores, std::string_view statistic,
                                               std::string_view reduction) {
        const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
        const Statistic kind = check_class_statistic(statistic);
        const std::int64_t class_dim = check_scores(score, target, num_classes);
        check_rule(rule, score, num_classes, /*binary=*/false);
        check_class_loss(values, score, target, weight, sample_weight, num_classes);
        Call call(kind, score, class_dim, target, sample_weight, /*upstream=*/{}, values);
        call.p.acc_is_double = acc_of(values) == at::kDouble;
        call.follow(rule, num_classes);
        call.weigh_classes(weight);
        call.p.ignore_index = ignore_index;
        const auto [loss, denominator] = call.new_loss(reduction, acc_of(values));
        const Tensor mask = call.new_mask(), kept_target = call.new_kept_target();
        const Tensor scores = call.new_scores(with_scores);
        driver().loss(call.p);
        return {loss, denominator, mask, kept_target, scores};
    }

    static LossAndMore z_error_loss(const Tensor& input, const Tensor& target, const OptionalTensor& moments,
                                    const OptionalTensor& pos_weight, const OptionalTensor& sample_weight,
                                    const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                    std::string_view statistic, std::string_view tail, std::int64_t min_count,
                                    bool keep_small, bool with_scores, std::string_view reduction) {
        const ZErrorLossArgs args{input, target, pos_weight, sample_weight, statistic, reduction};
        check_loss(args);
        const Statistic kind = parse_statistic(statistic);
        const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
        const c10::SymInt groups = groups_of(input, kind);
        check_rule(rule, input, groups, is_binary(kind));
        Call call(kind, input, -1, target, sample_weight);
        call.follow(rule, groups.expect_int());
        call.weigh_positives(pos_weight);
        const auto [loss, denominator] = call.new_loss(reduction, acc_of(input));
        const Tensor mask = call.new_mask(), scores = call.new_scores(with_scores);
        driver().loss(call.p);
        return {loss, denominator, mask, scores};
    }

    static Tensor z_error_loss_backward(const Tensor& grad_loss, const Tensor& denominator, const Tensor& mask,
                                        const Tensor& input, const Tensor& target, const OptionalTensor& pos_weight,
                                        const OptionalTensor& sample_weight, std::string_view statistic,
                                        std::string_view reduction) {
        check_loss({input, target, pos_weight, sample_weight, statistic, reduction});
        const Tensor upstream = grad_loss.to(acc_of(input)).expand(input.sizes());
        Call call(parse_statistic(statistic), input, -1, target, sample_weight, upstream);
        call.weigh_positives(pos_weight);
        const Tensor kept = mask.contiguous();
        call.p.mask = const_cast<bool*>(kept.const_data_ptr<bool>());
        call.p.reduction = parse_z_reduction(reduction);
        if (call.p.reduction == Reduction::kMean) call.p.divisor = denominator.const_data_ptr();
        const Tensor grad = call.empty(input.sizes(), input.scalar_type());
        call.p.grad = grad.mutable_data_ptr();
        driver().gradient(call.p);
        return grad;
    }
};

// Shapes and dtypes alone.
struct Meta {
    static Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType dtype) {
        return at::empty_symint(sizes, at::TensorOptions().device(like.device()).dtype(dtype));
    }

    static Tensor class_moments(const Tensor& score, const Tensor& target, c10::SymInt num_classes,
                                std::string_view statistic, std::int64_t) {
        std::int64_t class_dim;
        check_moments(score, target, num_classes, statistic, &class_dim);
        return empty({3, num_classes}, score, at::kDouble);
    }

    static MaskAndMore z_error_mask(const Tensor& score, const Tensor& target, const Tensor& moments,
                                    const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                    std::string_view tail, std::int64_t min_count, bool keep_small, std::int64_t,
                                    bool with_scores, std::string_view statistic) {
        const OptionalTensor given(moments);
        check_class_statistic(statistic);
        check_rule({given, threshold_tensor, threshold, tail, min_count, keep_small}, score, moments.sym_size(-1),
                   /*binary=*/false);
        check_scores(score, target, moments.sym_size(1));
        parse_tail(tail);
        const auto sizes = target.sym_sizes();
        return {empty(sizes, target, at::kBool), empty(sizes, target, at::kLong), new_scores(target, with_scores)};
    }

    static ClassLossAndMore z_error_class_loss(const Tensor& values, const Tensor& score, const Tensor& target,
                                               c10::SymInt num_classes, const OptionalTensor& moments,
                                               const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                               const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                               std::string_view tail, std::int64_t min_count, bool keep_small,
                                               std::int64_t, bool with_scores, std::string_view statistic,
                                               std::string_view reduction) {
        check_class_statistic(statistic);
        check_scores(score, target, num_classes);
        check_rule({moments, threshold_tensor, threshold, tail, min_count, keep_small}, score, num_classes,
                   /*binary=*/false);
        check_class_loss(values, score, target, weight, sample_weight, num_classes);
        parse_tail(tail);
        const auto sizes = target.sym_sizes();
        const bool none = parse_z_reduction(reduction) == Reduction::kNone;
        return {empty(none ? sizes : c10::SymIntArrayRef(), values, acc_of(values)), empty({}, values, acc_of(values)),
                empty(sizes, target, at::kBool), empty(sizes, target, at::kLong), new_scores(target, with_scores)};
    }

    static LossAndMore z_error_loss(const Tensor& input, const Tensor& target, const OptionalTensor& moments,
                                    const OptionalTensor& pos_weight, const OptionalTensor& sample_weight,
                                    const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold,
                                    std::string_view statistic, std::string_view tail, std::int64_t min_count,
                                    bool keep_small, bool with_scores, std::string_view reduction) {
        check_loss({input, target, pos_weight, sample_weight, statistic, reduction});
        const Statistic kind = parse_statistic(statistic);
        check_rule({moments, threshold_tensor, threshold, tail, min_count, keep_small}, input, groups_of(input, kind),
                   is_binary(kind));
        parse_tail(tail);
        const bool none = parse_z_reduction(reduction) == Reduction::kNone;
        const auto sizes = input.sym_sizes();
        return {empty(none ? sizes : c10::SymIntArrayRef(), input, acc_of(input)), empty({}, input, acc_of(input)),
                empty(sizes, input, at::kBool), new_scores(input, with_scores)};
    }

    static Tensor z_error_loss_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor& input, const Tensor&,
                                        const OptionalTensor&, const OptionalTensor&, std::string_view,
                                        std::string_view) {
        return empty(input.sym_sizes(), input, input.scalar_type());
    }

private:
    static Tensor new_scores(const Tensor& rows, bool wanted) {
        return wanted ? empty(rows.sym_sizes(), rows, at::kDouble) : empty({0}, rows, at::kDouble);
    }
};

template <class Ops>
void implement(torch::Library& m) {
    m.impl("class_moments", &Ops::class_moments);
    m.impl("z_error_mask", &Ops::z_error_mask);
    m.impl("z_error_class_loss", &Ops::z_error_class_loss);
    m.impl("z_error_loss", &Ops::z_error_loss);
    m.impl("z_error_loss_backward", &Ops::z_error_loss_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { implement<OnDevice<cpu_z_error>>(m); }
TORCH_LIBRARY_IMPL(fused_losses, Meta, m) { implement<Meta>(m); }

#ifdef FL_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) { implement<OnDevice<cuda_z_error>>(m); }
#endif

}  // namespace fused_losses
