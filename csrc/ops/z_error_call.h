// What a Z-Error operator says to its driver: inputs, outputs and their memory.
#pragma once

#include <ATen/ops/empty.h>

#include "ops/row_layout.h"
#include "ops/z_error_args.h"

namespace fused_losses {

inline ElementType element_type(const at::Tensor& t) {
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
inline Elements vector_of(const at::Tensor& t) {
    return {t.const_data_ptr(), element_type(t), {0, t.dim() == 0 ? 0 : t.stride(0)}};
}

// A ZProblem together with the tensors that keep its memory alive.
class ZErrorCall {
public:
    // class_dim: of the logits that `input` may hold, else -1.
    ZErrorCall(Statistic statistic, const at::Tensor& in, std::int64_t class_dim, const at::Tensor& labels,
               const OptionalTensor& weight = std::nullopt, const at::Tensor& upstream_of_rows = {},
               const at::Tensor& values_of_rows = {})
        : sizes(labels.sizes()), input(in), target(labels), upstream(upstream_of_rows), values(values_of_rows) {
        if (weight) sample_weight = *weight;
        p.statistic = statistic;
        p.acc_is_double = acc_of(input) == at::kDouble;
        p.device = input.device().index();
        p.gathers = class_dim >= 0;
        if (!lay_out(class_dim)) make_contiguous(class_dim);
        if (p.gathers) p.class_stride = input.stride(class_dim);
    }

    at::Tensor empty(at::IntArrayRef size, at::ScalarType dtype) const {
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

    // The input holds logits whose cross entropies are the scores.
    void score_by_entropy(const ClassScore& by) {
        EntropyScores& e = p.entropy;
        e.logits = p.input;
        e.class_stride = p.class_stride;
        e.label_smoothing = by.label_smoothing;
        e.logit_bias = by.logit_bias;
        if (by.logit_bias_tensor && by.logit_bias_tensor->is_cpu()) {
            e.logit_bias = by.logit_bias_tensor->item<double>();  // on the CPU already: no synchronisation
        } else if (by.logit_bias_tensor) {
            logit_bias = by.logit_bias_tensor->to(acc_of(input));
            e.logit_bias_device = logit_bias.const_data_ptr();
        }
        entropies = empty({p.rows()}, acc_of(input));
        e.scores = entropies.mutable_data_ptr();
        p.input = {e.scores, element_type(entropies), {p.inner, 1}};
        p.gathers = false;
    }

    at::Tensor new_mask() {
        const at::Tensor mask = empty(sizes, at::kBool);
        p.mask = mask.mutable_data_ptr<bool>();
        return mask;
    }

    at::Tensor new_scores(bool wanted) {
        if (!wanted) return empty({0}, at::kDouble);
        const at::Tensor scores = empty(sizes, at::kDouble);
        p.scores = scores.mutable_data_ptr<double>();
        return scores;
    }

    at::Tensor new_kept_target() {
        const at::Tensor kept_target = empty(sizes, at::kLong);
        p.kept_target = kept_target.mutable_data_ptr<std::int64_t>();
        return kept_target;
    }

    at::Tensor new_row_weight(bool wanted, at::ScalarType acc) {
        if (!wanted) return empty({0}, acc);
        const at::Tensor row_weight = empty(sizes, acc);
        p.row_weights = row_weight.mutable_data_ptr();
        return row_weight;
    }

    // The loss and what its mean is divided by.
    std::tuple<at::Tensor, at::Tensor> new_loss(std::string_view reduction, at::ScalarType acc) {
        p.reduction = parse_z_reduction(reduction);
        const bool none = p.reduction == Reduction::kNone;
        const at::Tensor loss = empty(none ? at::IntArrayRef(sizes) : at::IntArrayRef(), acc),
                         denominator = empty({}, acc);
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
        const auto elements = [&](const at::Tensor& t, int i) {
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

    at::Tensor input, target, sample_weight, upstream, values, moments, threshold, logit_bias, entropies;
};

}  // namespace fused_losses
