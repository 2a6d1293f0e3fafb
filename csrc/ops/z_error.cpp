// CPU, CUDA and Meta entries of the Z-Error operators: check, allocate, describe the call as a ZProblem, hand it to the
// device's driver. Nothing here differs between devices.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "losses/cross_entropy.h"
#include "ops/row_loss_operator.h"
#include "ops/z_error_call.h"
#include "z_error/driver.h"

namespace fused_losses {
namespace {

using at::Tensor;

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
using ClassLossAndMore = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// For devices whose loss does not compute them.
Tensor cross_entropies(const Tensor& logits, const Tensor& target, const ClassScore& by, std::int64_t ignore_index) {
    static const Operator<Tensor> op("fused_losses::row_loss");
    const OptionalTensor absent;
    const double params[] = {by.label_smoothing};
    return op({logits, target, absent, absent, by.logit_bias_tensor, absent, CrossEntropy::name, params, by.logit_bias,
               ignore_index, "none"});
}

template <ZErrorDriver (*driver)()>
struct ZErrorOn {
    static Tensor class_moments(const Tensor& score, const Tensor& target, std::int64_t num_classes,
                                std::string_view statistic, std::int64_t ignore_index) {
        std::int64_t class_dim;
        const Statistic kind = check_moments(score, target, num_classes, statistic, &class_dim);
        ZErrorCall call(kind, score, class_dim, target);
        call.p.num_groups = num_classes;
        call.p.ignore_index = ignore_index;
        const Tensor moments = call.empty({3, num_classes}, at::kDouble);
        driver().moments(call.p, moments.mutable_data_ptr<double>());
        return moments;
    }

    static MaskAndMore z_error_mask(const Tensor& score, const Tensor& target, std::int64_t ignore_index, const OptionalTensor& moments, const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold, std::string_view statistic, std::string_view tail, std::int64_t min_count, bool keep_small, bool with_scores) {
        const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
        const Statistic kind = check_class_statistic(statistic);
        check_rule(rule, score, moments->sym_size(-1), /*binary=*/false);
        ZErrorCall call(kind, score, check_scores(score, target, moments->sym_size(1)), target);
        call.follow(rule, moments->size(1));
        call.p.ignore_index = ignore_index;
        const Tensor mask = call.new_mask(), kept_target = call.new_kept_target();
        const Tensor scores = call.new_scores(with_scores);
        driver().mask(call.p);
        return {mask, kept_target, scores};
    }

    static ClassLossAndMore z_error_class_loss(const Tensor& values, const Tensor& score, const Tensor& target, std::int64_t num_classes, const OptionalTensor& weight, const OptionalTensor& sample_weight, const OptionalTensor& logit_bias_tensor, double label_smoothing, double logit_bias, bool unweighted, std::int64_t ignore_index, std::string_view reduction, const OptionalTensor& moments, const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold, std::string_view statistic, std::string_view tail, std::int64_t min_count, bool keep_small, bool with_scores) {
        const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
        const std::int64_t class_dim = check_scores(score, target, num_classes);
        const ClassScore by =
            check_class_score(values, score, class_dim, statistic, label_smoothing, logit_bias, logit_bias_tensor);
        check_rule(rule, score, num_classes, /*binary=*/false);
        check_class_loss(values, score, target, weight, sample_weight, num_classes);
        const bool first = by.entropy && !driver().has_entropy;
        const Tensor numbers = first ? cross_entropies(score, target, by, ignore_index) : score;
        ZErrorCall call(by.statistic, numbers, first ? -1 : class_dim, target, sample_weight, /*upstream=*/{}, values);
        if (by.entropy && !first) call.score_by_entropy(by);
        call.p.acc_is_double = acc_of(values) == at::kDouble;
        call.follow(rule, num_classes);
        call.weigh_classes(weight);
        call.p.ignore_index = ignore_index;
        const auto [loss, denominator] = call.new_loss(reduction, acc_of(values));
        const Tensor mask = call.new_mask(), kept_target = call.new_kept_target();
        const Tensor scores = call.new_scores(with_scores),
                     row_weight = call.new_row_weight(unweighted, acc_of(values));
        driver().loss(call.p);
        return {loss, denominator, mask, kept_target, scores, row_weight};
    }

    static LossAndMore z_error_loss(const Tensor& input, const Tensor& target, const OptionalTensor& pos_weight, const OptionalTensor& sample_weight, std::string_view reduction, const OptionalTensor& moments, const OptionalTensor& threshold_tensor, at::ArrayRef<double> threshold, std::string_view statistic, std::string_view tail, std::int64_t min_count, bool keep_small, bool with_scores) {
        const ZErrorLossArgs args{input, target, pos_weight, sample_weight, statistic, reduction};
        check_loss(args);
        const Statistic kind = parse_statistic(statistic);
        const ZErrorRule rule{moments, threshold_tensor, threshold, tail, min_count, keep_small};
        const c10::SymInt groups = groups_of(input, kind);
        check_rule(rule, input, groups, is_binary(kind));
        ZErrorCall call(kind, input, -1, target, sample_weight);
        call.follow(rule, groups.expect_int());
        call.weigh_positives(pos_weight);
        const auto [loss, denominator] = call.new_loss(reduction, acc_of(input));
        const Tensor mask = call.new_mask(), scores = call.new_scores(with_scores);
        driver().loss(call.p);
        return {loss, denominator, mask, scores};
    }

    static Tensor z_error_loss_backward(const Tensor& grad_loss, const Tensor& denominator, const Tensor& mask, std::string_view statistic, const Tensor& input, const Tensor& target, const OptionalTensor& pos_weight, const OptionalTensor& sample_weight, std::string_view reduction) {
        check_loss({input, target, pos_weight, sample_weight, statistic, reduction});
        const Tensor upstream = grad_loss.to(acc_of(input)).expand(input.sizes());
        ZErrorCall call(parse_statistic(statistic), input, -1, target, sample_weight, upstream);
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

template <class Ops>
void implement_z_error(torch::Library& m) {
    m.impl("class_moments", &Ops::class_moments);
    m.impl("z_error_mask", &Ops::z_error_mask);
    m.impl("z_error_class_loss", &Ops::z_error_class_loss);
    m.impl("z_error_loss", &Ops::z_error_loss);
    m.impl("z_error_loss_backward", &Ops::z_error_loss_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { implement_z_error<ZErrorOn<cpu_z_error>>(m); }

#ifdef FL_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) { implement_z_error<ZErrorOn<cuda_z_error>>(m); }
#endif

}  // namespace fused_losses
