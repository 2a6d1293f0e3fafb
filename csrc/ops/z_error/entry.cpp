// Entry of the Z-Error operators: checks, allocates, describes the call as a ZProblem, hands it to the device's
// backend. Nothing here differs between devices.
#include <memory>
#include <vector>

#include "ops/operators.h"
#include "ops/row_layout.h"
#include "ops/z_error/checks.h"

namespace fused_losses {
namespace {

// A vector that does not belong to rows: thresholds, weights of classes or tasks.
Elements vector_of(const Tensor& t) {
    return {t.const_data_ptr(), *element_type(t), {0, t.dim() == 0 ? 0 : t.stride(0)}};
}

// A ZProblem together with the tensors that keep its memory alive. Outputs are made where they are named first.
class ZErrorCall {
public:
    // class_dim: of the logits that args.input may hold, else -1.
    ZErrorCall(ZErrorArgs& arguments, Statistic statistic, std::int64_t class_dim, std::int64_t groups)
        : args(arguments), acc(acc_of(args.values ? *args.values : args.input)) {
        p.statistic = statistic;
        p.acc_is_double = acc == dtypes::float64;
        p.device = args.input.device().index;
        p.num_groups = groups;
        p.gathers = class_dim >= 0;
        lay_out(class_dim);
        if (p.gathers) p.class_stride = args.input.stride(class_dim);
        if (args.weight) p.class_weight = vector_of(*args.weight);
        if (args.pos_weight) {
            p.pos_weight = vector_of(*args.pos_weight);
            p.num_pos_weights = args.pos_weight->numel();
        }
    }

    const Backend& backend() const { return backend_of(args.input.device()); }
    Sizes rows() const { return args.target.sizes(); }

    void follow_rule() {
        if (args.moments) {
            if (!args.moments->is_contiguous()) args.moments = contiguous(*args.moments);
            p.moments = static_cast<const double*>(args.moments->const_data_ptr());
        } else {
            args.moments = empty_moments();
            p.moments = p.own_moments = pointer<double>(*args.moments);
        }
        p.tail = parse_tail(args.tail);
        p.min_count = static_cast<double>(args.min_count);
        p.keep_small = args.keep_small;
        if (!args.threshold_tensor) {
            p.num_thresholds = static_cast<std::int64_t>(args.threshold.count);
            std::copy_n(args.threshold.values.begin(), args.threshold.count, p.thresholds);
        } else if (args.threshold_tensor->dim() == 0 && args.threshold_tensor->device().is_cpu()) {
            p.thresholds[0] = number_in(*args.threshold_tensor);  // no synchronisation
        } else {
            p.num_thresholds = args.threshold_tensor->numel();
            p.threshold = vector_of(*args.threshold_tensor);
        }
    }

    // The input holds logits whose cross entropies are the scores.
    void score_by_entropy() {
        EntropyScores& e = p.entropy;
        e.logits = p.input;
        e.class_stride = p.class_stride;
        e.label_smoothing = args.label_smoothing;
        e.logit_bias = args.logit_bias;
        if (args.logit_bias_tensor && args.logit_bias_tensor->device().is_cpu()) {
            e.logit_bias = number_in(*args.logit_bias_tensor);  // no synchronisation
        } else if (args.logit_bias_tensor) {
            convert(*args.logit_bias_tensor, acc);
            e.logit_bias_device = args.logit_bias_tensor->const_data_ptr();
        }
        const std::int64_t sizes[] = {p.rows()};
        entropies = empty(sizes, acc);
        e.scores = entropies.mutable_data_ptr();
        p.input = {e.scores, *element_type(entropies), {p.inner, 1}};
        p.gathers = false;
    }

    Tensor empty_moments() const {
        const std::int64_t sizes[] = {3, p.num_groups};
        return empty(sizes, dtypes::float64);
    }

    Tensor new_mask() {
        Tensor mask = empty(rows(), dtypes::boolean);
        p.mask = pointer<bool>(mask);
        return mask;
    }

    Tensor new_scores() {
        Tensor scores = empty(args.with_scores ? rows() : kNoRows, dtypes::float64);
        if (args.with_scores) p.scores = pointer<double>(scores);
        return scores;
    }

    Tensor new_kept_target() {
        Tensor kept_target = empty(rows(), dtypes::int64);
        p.kept_target = pointer<std::int64_t>(kept_target);
        return kept_target;
    }

    Tensor new_row_weight() {
        Tensor row_weight = empty(args.unweighted ? rows() : kNoRows, acc);
        if (args.unweighted) p.row_weights = row_weight.mutable_data_ptr();
        return row_weight;
    }

    Tensor new_loss() {
        p.reduction = parse_z_reduction(args.reduction);
        const bool none = p.reduction == Reduction::kNone;
        Tensor loss = empty(none ? rows() : Sizes(), acc);
        (none ? p.row_values : p.loss) = loss.mutable_data_ptr();
        return loss;
    }

    // What the loss's mean is divided by.
    Tensor new_denominator() {
        Tensor denominator = empty({}, acc);
        p.denominator = denominator.mutable_data_ptr();
        return denominator;
    }

    Tensor new_grad() {
        Tensor grad = empty(rows(), args.input.dtype());
        p.grad = grad.mutable_data_ptr();
        return grad;
    }

    ZProblem p;

private:
    static constexpr std::int64_t kZero[] = {0};
    static constexpr Sizes kNoRows{kZero};

    Tensor empty(Sizes sizes, DtypeCode dtype) const { return fused_losses::empty(sizes, dtype, args.input.device()); }

    template <class T>
    static T* pointer(const Tensor& t) {
        return static_cast<T*>(t.mutable_data_ptr());
    }

    void lay_out(std::int64_t class_dim) {
        const auto optional = [](OptionalTensor& t) { return t ? &*t : nullptr; };
        RowTensor tensors[] = {{&args.target},
                               {optional(args.sample_weight)},
                               {optional(args.grad_loss)},
                               {optional(args.values)},
                               {&args.input, class_dim}};
        const RowLayout layout = lay_out_rows(rows(), tensors);
        p.outer = layout.outer;
        p.inner = layout.inner;
        Elements* const elements[] = {&p.target, &p.sample_weight, &p.upstream, &p.values, &p.input};
        for (int i = 0; i < 5; ++i) {
            if (!tensors[i].tensor) continue;
            const Tensor& t = *tensors[i].tensor;
            const auto type = element_type(t);
            check(type.has_value(), i == 0 ? "target" : "grad_loss", " must not be of dtype ", t.dtype());
            *elements[i] = {t.const_data_ptr(), *type, tensors[i].stride};
        }
    }

    ZErrorArgs& args;
    const DtypeCode acc;
    Tensor entropies;
};

// An operator's own arguments, then the rule that ends every schema.
template <class... Fields>
void read(const StableIValue* stack, ZErrorArgs& args, Fields&&... fields) {
    Arguments(stack).read(std::forward<Fields>(fields)..., args.moments, args.threshold_tensor, args.threshold,
                          args.statistic, args.tail, args.min_count, args.keep_small, args.with_scores);
}

void class_moments(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    Arguments(stack).read(args.input, args.target, args.num_classes, args.statistic, args.ignore_index);
    const Statistic statistic = parse_statistic(args.statistic);
    ZErrorCall call(args, statistic, check_moments(args, statistic), args.num_classes);
    call.p.ignore_index = args.ignore_index;
    Tensor moments = call.empty_moments();
    call.backend().class_moments(call.p, static_cast<double*>(moments.mutable_data_ptr()));
    Results(stack).push(moments);
}

void z_error_constants(StableIValue* stack, std::uint64_t, std::uint64_t) {
    double threshold = 0, momentum = 0;
    ZErrorArgs args;
    Arguments(stack).read(threshold, args.statistic, args.tail, args.min_count, args.keep_small, args.ignore_index,
                          momentum);
    Tensor packed = pack(ZErrorConstants::of(args, threshold, momentum));
    Results(stack).push(packed);
}

void z_error_kept_target(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    Tensor packed;
    Arguments(stack).read(args.input, args.target, args.moments, packed);
    const ZErrorConstants constants = ZErrorConstants::unpack(packed);
    const std::int64_t classes = args.input.dim() == 2 ? args.input.size(1) : 0;
    check_value(classes >= 1, "logits must have shape (N, C), got ", args.input.sizes());
    check_value(args.target.dim() == 1, "target must have shape (N,), got ", args.target.sizes());
    const std::int64_t class_dim = check_scores(args, classes);
    if (args.moments) {
        check_moments_of(classes, *args.moments, args.input);
        check_value(args.moments->is_contiguous(), "running must be contiguous");
    }
    ZErrorCall call(args, constants.statistic, class_dim, classes);
    if (constants.by_entropy) call.score_by_entropy();
    ZProblem& p = call.p;
    constants.set_rule(p);
    if (args.moments) check_classes(p);  // the loss would raise after the running moments have learnt from the batch
    std::vector<double> moments(3 * classes);
    call.backend().class_moments(p, moments.data());
    p.moments = moments.data();
    if (args.moments) {
        auto* const running = static_cast<double*>(args.moments->mutable_data_ptr());
        call.backend().update_moments(running, moments.data(), classes, constants.momentum, p.device);
        p.moments = running;
    }
    const auto mask = std::make_unique<bool[]>(p.rows());
    p.mask = mask.get();
    Tensor kept_target = call.new_kept_target();
    call.backend().z_error_mask(p);
    Results(stack).push(kept_target);
}

void z_error_mask(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    read(stack, args, args.input, args.target, args.ignore_index);
    check_value(args.moments.has_value(), "moments must be given, got None");
    const Statistic statistic = check_class_statistic(args);
    const std::int64_t groups = args.moments->dim() == 0 ? 0 : args.moments->sizes().back();
    check_rule(args, groups, /*binary=*/false);
    ZErrorCall call(args, statistic, check_scores(args, groups), groups);
    call.follow_rule();
    call.p.ignore_index = args.ignore_index;
    Tensor mask = call.new_mask(), kept_target = call.new_kept_target(), scores = call.new_scores();
    call.backend().z_error_mask(call.p);
    Results(stack).push(mask, kept_target, scores);
}

void z_error_class_loss(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    read(stack, args, Required{args.values}, args.input, args.target, args.num_classes, args.weight, args.sample_weight,
         args.logit_bias_tensor, args.label_smoothing, args.logit_bias, args.unweighted, args.ignore_index,
         args.reduction);
    const std::int64_t class_dim = check_scores(args, args.num_classes);
    const ClassScore by = check_class_score(args, class_dim);
    check_rule(args, args.num_classes, /*binary=*/false);
    check_class_loss(args);
    ZErrorCall call(args, by.statistic, class_dim, args.num_classes);
    if (by.entropy) call.score_by_entropy();
    call.follow_rule();
    call.p.ignore_index = args.ignore_index;
    Tensor loss = call.new_loss(), denominator = call.new_denominator(), mask = call.new_mask(),
           kept_target = call.new_kept_target(), scores = call.new_scores(), row_weight = call.new_row_weight();
    call.backend().z_error_loss(call.p);
    Results(stack).push(loss, denominator, mask, kept_target, scores, row_weight);
}

void z_error_loss(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    read(stack, args, args.input, args.target, args.pos_weight, args.sample_weight, args.reduction);
    const Statistic statistic = check_loss(args);
    const std::int64_t groups = groups_of(args.input, statistic);
    check_rule(args, groups, is_binary(statistic));
    ZErrorCall call(args, statistic, /*class_dim=*/-1, groups);
    call.follow_rule();
    Tensor loss = call.new_loss(), denominator = call.new_denominator(), mask = call.new_mask(),
           scores = call.new_scores();
    call.backend().z_error_loss(call.p);
    Results(stack).push(loss, denominator, mask, scores);
}

void z_error_loss_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    ZErrorArgs args;
    Arguments(stack).read(Required{args.grad_loss}, args.denominator, args.mask, args.statistic, args.input,
                          args.target, args.pos_weight, args.sample_weight, args.reduction);
    const Statistic statistic = check_loss(args);
    const Reduction reduction = parse_z_reduction(args.reduction);
    check_upstream(*args.grad_loss, args.input, args.input.sizes());
    check_saved(args, reduction);
    ZErrorCall call(args, statistic, /*class_dim=*/-1, groups_of(args.input, statistic));
    if (!args.mask.is_contiguous()) args.mask = contiguous(args.mask);
    call.p.mask = static_cast<bool*>(const_cast<void*>(args.mask.const_data_ptr()));
    call.p.reduction = reduction;
    if (reduction == Reduction::kMean) call.p.divisor = args.denominator.const_data_ptr();
    Tensor grad = call.new_grad();
    call.backend().z_error_gradient(call.p);
    Results(stack).push(grad);
}

void update_moments_(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Tensor running, batch;
    double momentum = 0;
    Arguments(stack).read(running, batch, momentum);
    for (const Tensor* t : {&running, &batch}) {
        const char* const name = t == &running ? "running" : "batch";
        check(t->dtype() == dtypes::float64, name, " must be float64, got ", t->dtype());
        check_value(t->dim() == 2 && t->size(0) == 3 && t->is_contiguous(), name,
                    " must be contiguous and of shape (3, groups), got ", t->sizes());
    }
    check_same_device("batch", batch, running);
    check_value(running.sizes() == batch.sizes(), "batch must have the shape of running, ", running.sizes(), ", got ",
                batch.sizes());
    backend_of(running.device())
        .update_moments(static_cast<double*>(running.mutable_data_ptr()),
                        static_cast<const double*>(batch.const_data_ptr()), running.size(1), momentum,
                        running.device().index);
}

}  // namespace

void implement_z_error(Library& m) {
    m.impl("class_moments", &class_moments);
    m.impl("z_error_mask", &z_error_mask);
    m.impl("z_error_class_loss", &z_error_class_loss);
    m.impl("z_error_loss", &z_error_loss);
    m.impl("z_error_loss_backward", &z_error_loss_backward);
    m.impl("update_moments_", &update_moments_);
}

// For small calls on the CPU.
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { m.impl("z_error_kept_target", &z_error_kept_target); }
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
    m.impl("z_error_constants", &z_error_constants);
}

}  // namespace fused_losses
