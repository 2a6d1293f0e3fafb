// Entry of the row-loss operators: checks, allocates, describes the call as a RowProblem, hands it to the device's
// backend. Nothing here differs between devices.
#include "ops/operators.h"
#include "ops/row_layout.h"
#include "ops/row_loss/checks.h"

#include <optional>

namespace fused_losses {
namespace {

// A RowProblem together with the tensors that keep its memory alive: the arguments, converted to what kernels take.
class RowLossCall {
public:
    // given_grad: the gradient of an earlier call for the same rows.
    RowLossCall(RowLossArgs arguments, bool with_grad, OptionalTensor grad_loss = {}, OptionalTensor given_grad = {},
                OtherLabel second = {})
        : args(std::move(arguments)), other(std::move(second)), shape(check_row_loss(args)), acc(acc_of(args.logits)) {
        describe_loss();
        if (other.target) take_other_label();
        if (shape.soft_target && args.target.dtype() != args.logits.dtype()) convert(args.target, acc);
        if (args.sample_weight) convert(*args.sample_weight, acc);
        if (grad_loss) take_upstream(std::move(*grad_loss));
        if (given_grad) check_given_grad(args, *given_grad);
        if (with_grad) grad = given_grad ? std::move(*given_grad) : empty_like(args.logits);
        lay_out();
        set_pointers();
        problem.grad_is_written = given_grad && upstream.defined() && !copied_grad.defined();
    }

    const Backend& backend() const { return backend_of(args.logits.device()); }

    // Allocates the loss; under "none" the rows' values are the loss.
    Tensor new_loss() {
        if (problem.reduction != Reduction::kNone) return empty({});
        Tensor loss = empty(shape.rows);
        problem.row_values = loss.mutable_data_ptr();
        return loss;
    }

    // Empty unless the loss is a quotient. Of a gradient that forward writes: followed by the upstream gradient for
    // which it is.
    Tensor new_denominator() {
        if (!grad.defined() || problem.reduction == Reduction::kNone) return divides() ? empty({}) : empty(kNoNumbers);
        static constexpr std::int64_t two[] = {2};
        Tensor denominator = empty(two);
        problem.written_upstream = behind(denominator.mutable_data_ptr());
        return denominator;
    }

    // The upstream gradient for which forward writes the gradient, where no denominator is kept.
    Tensor new_upstream() {
        Tensor number = empty({});
        problem.written_upstream = number.mutable_data_ptr();
        return number;
    }

    // with_bits: behind them, in words as long as they are.
    Tensor new_stats(bool with_bits) {
        const std::int64_t words = with_bits ? backend().words_of_bits(problem) : 0;
        const std::int64_t sizes[] = {problem.stats_count + words, problem.rows()};
        Tensor stats = empty(sizes);
        problem.stats = stats.mutable_data_ptr();
        if (words > 0) problem.bits = behind_stats();
        return stats;
    }

    // Allocates row statistics.
    RowStatisticsTensors new_statistics() {
        check(!shape.soft_target, args.loss, ": row statistics need class indices, got class probabilities");
        return {problem, acc, args.logits.device()};
    }

    // Takes what forward has saved; whether that is enough for the gradient.
    bool take_saved(Tensor& stats, Tensor& denominator) {
        // [0, rows], on CUDA: backward recomputes them. [0]: forward saved nothing at all.
        if (stats.dim() == 1 && stats.numel() == 0) return false;
        RowProblem writing = problem;  // the forward of this backward
        writing.upstream = nullptr;
        const bool recomputes = stats.dim() == 2 && stats.size(0) == 0 && backend().backward_recomputes(writing);
        if (recomputes) problem.stats_count = 0;
        check_saved(stats, denominator);
        if (!denominator.is_contiguous()) denominator = contiguous(denominator);
        if (divides()) problem.denominator = denominator.const_data_ptr();
        if (denominator.numel() == 2)
            problem.written_upstream = behind(const_cast<void*>(denominator.const_data_ptr()));
        if (recomputes) return true;
        if (!stats.is_contiguous()) stats = contiguous(stats);
        problem.stats = const_cast<void*>(stats.const_data_ptr());
        const std::int64_t words = stats.size(0) - problem.stats_count;
        if (words > 0 && words == backend().words_of_bits(problem)) problem.bits = behind_stats();
        return problem.stats != nullptr;
    }

    void take_written_upstream(const Tensor& number) {
        const Device device = args.logits.device();
        check(number.numel() == 1 && number.dtype() == acc && number.device() == device, args.loss,
              ": upstream must be the one that forward has saved, a number of ", acc, " on ", device, ", got ",
              number.dtype(), " of shape ", number.sizes(), " on ", number.device());
        problem.written_upstream = const_cast<void*>(number.const_data_ptr());
    }

    // The gradient in the layout of the caller's logits.
    Tensor finished_grad() {
        if (!copied_grad.defined()) return std::move(grad);
        copy_into(copied_grad, grad);
        return std::move(copied_grad);
    }

    RowProblem problem;

private:
    static constexpr std::int64_t kNoNumbers[] = {0};

    Tensor empty(Sizes sizes) const { return fused_losses::empty(sizes, acc, args.logits.device()); }

    void check_saved(const Tensor& stats, const Tensor& denominator) const {
        const Device device = args.logits.device();
        const bool has_rows = stats.dim() == 2 && stats.size(1) == problem.rows();
        const bool has_numbers = has_rows && stats.size(0) >= problem.stats_count;  // bits may be behind them
        check(has_numbers && stats.dtype() == acc && stats.device() == device, args.loss,
              ": stats must be those that forward has saved, ", acc, " of shape [", problem.stats_count, ", ",
              problem.rows(), "] or [0] on ", device, ", got ", stats.dtype(), " of shape ", stats.sizes(), " on ",
              stats.device());
        const std::int64_t numbers = denominator.numel();  // the second one is of a gradient that forward has written
        const bool fits = numbers == 0 || (denominator.dtype() == acc && denominator.device() == device);
        check(fits && numbers <= 2 && (numbers > 0 || !divides()), args.loss,
              ": denominator must be the one that forward has saved, a number of ", acc, " on ", device, ", got ",
              denominator.dtype(), " of shape ", denominator.sizes(), " on ", denominator.device());
    }

    void* behind(void* number) const {
        return static_cast<char*>(number) + (acc == dtypes::float64 ? sizeof(double) : sizeof(float));
    }

    void* behind_stats() const {
        return static_cast<char*>(problem.stats) +
               problem.stats_count * problem.rows() * std::int64_t(sizeof(float));  // doubles have no bits
    }

    bool divides() const {
        return problem.reduction == Reduction::kMean || problem.reduction == Reduction::kActiveMean;
    }

    void describe_loss() {
        const RowLossConstants& constants = args.constants;
        problem.loss = constants.loss;
        problem.reduction = constants.reduction;
        // Rounded here, so that choices that depend on a parameter see the number that kernels compute with.
        for (int i = 0; i < constants.num_params; ++i) problem.params[i] = rounded(constants.params[i]);
        derive_params(problem.loss, problem.params);
        problem.class_factors = class_factors_of(problem.loss, problem.params, shape.soft_target);
        problem.stats_count = stats_count_of(problem.loss, problem.class_factors);
        problem.ignore_index = constants.ignore_index;
        if (args.first_param) take_first_param(*args.first_param);
        problem.logit_bias = constants.logit_bias;
        if (!args.logit_bias_tensor) return;
        Tensor& bias = *args.logit_bias_tensor;
        if (bias.device().is_cpu()) {
            problem.logit_bias = number_in(bias);  // no synchronisation
        } else {
            convert(bias, acc);
            problem.logit_bias_device = bias.const_data_ptr();
        }
    }

    double rounded(double x) const { return acc == dtypes::float64 ? x : static_cast<double>(static_cast<float>(x)); }

    // The loss has been described with a number in its place: what depends on that holds for any.
    void take_first_param(Tensor& param) {
        if (param.device().is_cpu() && !needs_of(problem.loss).has_margin) {
            problem.params[0] = rounded(number_in(param));
        } else {
            problem.first_param = vector_in(param);
            problem.first_param_stride = param.dim();  // one number, or one after the other
        }
    }

    void take_other_label() {
        check_other_label(args, other, shape);
        if (other.target->dtype() != args.target.dtype())  // the narrower one has no room for all labels of the other
            for (Tensor* const labels : {&args.target, &*other.target}) convert(*labels, dtypes::int64);
        if (other.lam) convert(*other.lam, acc);
        problem.lam_of_all = other.lam_of_all;
    }

    void take_upstream(Tensor grad_loss) {
        check_upstream(grad_loss, args.logits, shape.rows);
        convert(grad_loss, acc);
        upstream = std::move(grad_loss);
    }

    void lay_out() {
        RowTensor tensors[] = {{&args.target, shape.soft_target ? shape.class_dim : -1},
                               {args.sample_weight ? &*args.sample_weight : nullptr},
                               {upstream.defined() ? &upstream : nullptr},
                               {other.target ? &*other.target : nullptr},
                               {other.lam ? &*other.lam : nullptr},
                               {&args.logits, shape.class_dim},
                               {grad.defined() ? &grad : nullptr, shape.class_dim}};
        const RowLayout layout = lay_out_rows(shape.rows, tensors);
        problem.outer = layout.outer;
        problem.inner = layout.inner;
        (shape.soft_target ? problem.soft_target_stride : problem.target_stride) = tensors[0].stride;
        problem.sample_weight_stride = tensors[1].stride;
        problem.upstream_stride = tensors[2].stride;
        problem.other_target_stride = tensors[3].stride;
        problem.lam_stride = tensors[4].stride;
        problem.logits_stride = tensors[5].stride;
        problem.grad_stride = tensors[6].stride;
        copied_grad = std::move(tensors[6].original);
    }

    void set_pointers() {
        const Tensor &logits = args.logits, &target = args.target;
        problem.device = logits.device().index;
        problem.dtype = dtype_of(*element_type(logits));
        problem.num_classes = logits.size(shape.class_dim);
        problem.logits = logits.const_data_ptr();
        problem.logits_class_stride = logits.stride(shape.class_dim);
        if (shape.soft_target) {
            problem.soft_target = target.const_data_ptr();
            problem.soft_target_is_stored = target.dtype() == logits.dtype();
            problem.soft_target_class_stride = target.stride(shape.class_dim);
        } else {
            problem.target = target.const_data_ptr();
            problem.index_type = index_type_of(*element_type(target));
        }
        if (args.weight) problem.class_weight = vector_in(*args.weight);
        if (args.sample_weight) problem.sample_weight = args.sample_weight->const_data_ptr();
        if (other.target) problem.other_target = other.target->const_data_ptr();
        if (other.lam) problem.lam = other.lam->const_data_ptr();
        if (upstream.defined()) problem.upstream = upstream.const_data_ptr();
        if (grad.defined()) {
            problem.grad = grad.mutable_data_ptr();
            problem.grad_class_stride = grad.stride(shape.class_dim);
        }
        if (backend().backward_recomputes(problem)) problem.stats_count = 0;
    }

    const void* vector_in(Tensor& t) const {
        convert(t, acc);
        if (!t.is_contiguous()) t = contiguous(t);
        return t.const_data_ptr();
    }

    RowLossArgs args;
    OtherLabel other;
    const RowLossShape shape;
    const DtypeCode acc;
    Tensor upstream, grad;
    Tensor copied_grad;  // what the caller gets, where `grad` is a copy in another layout
};

// What forward gives beside the loss.
struct Asked {
    bool stats = false, bits = false;     // for backward: numbers of each row, and of some losses bits
    bool grad = false, in_place = false;  // in place: in memory of the caller's
    bool row_statistics = false;
};

template <Asked asked>
void forward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    OptionalTensor grad;
    if (asked.in_place) in.read(Required{grad});
    RowLossCall call(RowLossArgs(in), asked.grad, {}, std::move(grad));
    std::optional<RowStatisticsTensors> looks;
    if (asked.row_statistics) looks = call.new_statistics();
    Tensor loss = call.new_loss(), stats, denominator;
    if (asked.stats) stats = call.new_stats(asked.bits), denominator = call.new_denominator();
    const bool weighs = asked.stats && denominator.numel() > 0;
    call.backend().row_loss(call.problem, loss.mutable_data_ptr(), weighs ? denominator.mutable_data_ptr() : nullptr);
    Results out(stack);
    out.push(loss);
    if (asked.stats) out.push(stats, denominator);
    Tensor written = call.finished_grad();
    if (asked.grad && !asked.in_place) out.push(written);
    if (looks) out.push(looks->stats, looks->argmax);
}

// In place: completes the gradient that forward has written.
template <bool in_place>
void backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    Tensor grad_loss, stats, denominator;
    OptionalTensor grad;
    in.read(grad_loss, stats, denominator);
    if (in_place) in.read(Required{grad});
    RowLossCall call(RowLossArgs(in), /*with_grad=*/true, std::move(grad_loss), std::move(grad));
    // A forward saves nothing on the CPU where it has written the gradient, and nowhere for small calls or with row
    // statistics: it is run again.
    if (call.take_saved(stats, denominator) || call.problem.rows() == 0)
        call.backend().row_loss_gradient(call.problem);
    else
        call.backend().row_loss(call.problem, nullptr, nullptr);
    Tensor written = call.finished_grad();
    if (!in_place) Results(stack).push(written);
}

template <bool with_grad>
void packed_forward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    RowLossCall call(RowLossArgs::packed(in), with_grad);
    Tensor loss = call.new_loss();
    call.backend().row_loss(call.problem, loss.mutable_data_ptr(), nullptr);
    Results out(stack);
    out.push(loss);
    if (with_grad) out.push(call.finished_grad());
}

template <bool with_grad>
void mixed_forward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    OtherLabel other(in);
    RowLossCall call(RowLossArgs(in), with_grad, {}, {}, std::move(other));
    Tensor loss = call.new_loss(), upstream;
    if (with_grad) upstream = call.new_upstream();
    call.backend().row_loss(call.problem, loss.mutable_data_ptr(), nullptr);
    Results out(stack);
    out.push(loss);
    if (with_grad) out.push(upstream, call.finished_grad());
}

template <bool in_place>
void mixed_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    Tensor grad_loss, upstream;
    OptionalTensor grad;
    in.read(grad_loss);
    if (in_place) in.read(upstream, Required{grad});
    OtherLabel other(in);
    RowLossCall call(RowLossArgs(in), /*with_grad=*/true, std::move(grad_loss), std::move(grad), std::move(other));
    if (in_place) call.take_written_upstream(upstream);
    call.backend().row_loss(call.problem, nullptr, nullptr);
    Tensor written = call.finished_grad();
    if (!in_place) Results(stack).push(written);
}

void row_loss_constants(StableIValue* stack, std::uint64_t, std::uint64_t) {
    Arguments in(stack);
    Tensor packed = pack(RowLossConstants::read(in));
    Results(stack).push(packed);
}

}  // namespace

void implement_row_losses(Library& m) {
    m.impl("row_loss", &forward<Asked{}>);
    m.impl("row_loss_with_grad", &forward<Asked{.grad = true}>);
    m.impl("row_loss_with_stats", &forward<Asked{.stats = true}>);
    m.impl("row_loss_with_bits", &forward<Asked{.stats = true, .bits = true}>);
    m.impl("row_loss_with_stats_and_grad", &forward<Asked{.stats = true, .grad = true}>);
    m.impl("row_loss_backward", &backward<false>);
    m.impl("row_loss_backward_", &backward<true>);
    m.impl("mixed_loss", &mixed_forward<false>);
    m.impl("mixed_loss_with_grad", &mixed_forward<true>);
    m.impl("mixed_loss_backward", &mixed_backward<false>);
    m.impl("mixed_loss_backward_", &mixed_backward<true>);
    m.impl("row_loss_and_statistics", &forward<Asked{.row_statistics = true}>);
    m.impl("row_loss_with_grad_and_statistics", &forward<Asked{.grad = true, .row_statistics = true}>);
    m.impl("row_loss_with_stats_and_statistics", &forward<Asked{.stats = true, .row_statistics = true}>);
    m.impl("row_loss_with_bits_and_statistics", &forward<Asked{.stats = true, .bits = true, .row_statistics = true}>);
    m.impl("row_loss_with_stats_and_grad_and_statistics",
           &forward<Asked{.stats = true, .grad = true, .row_statistics = true}>);
}

// For calls into given memory, and small ones, on the CPU.
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
    m.impl("row_loss_with_grad_", &forward<Asked{.grad = true, .in_place = true}>);
    m.impl("row_loss.packed", &packed_forward<false>);
    m.impl("row_loss_with_grad.packed", &packed_forward<true>);
}
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CompositeExplicitAutograd, m) {
    m.impl("row_loss_constants", &row_loss_constants);
}

}  // namespace fused_losses
