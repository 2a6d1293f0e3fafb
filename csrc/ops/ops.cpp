// Every operator: its schema. Entries are in the other files of this folder and in those below.
//
// `loss` is a name of loss_names(), or of a loss that wrappers make (losses/registry.h), `params` its parameters in the
// order its header states; of some, a tensor `first_param` takes the place of the first (losses/needs.h). Losses are
// returned in float32 (float64 for float64 logits), gradients in the dtype of the logits. `reduction`: "none", "mean",
// "sum", for margin losses also "active_mean", over the rows whose loss is positive. Derivatives and the kernels for
// tracing (Meta) are registered in Python.
#include "ops/operators.h"

#include <string>

STABLE_TORCH_LIBRARY(fused_losses, m) {
    const std::string constants = "str loss, float[] params, float logit_bias, int ignore_index, str reduction";
    const std::string row_loss_arguments =
        "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? logit_bias_tensor, "
        "Tensor? first_param, " +
        constants;
    const auto def = [&](const std::string& name, const std::string& more, const std::string& returns) {
        m.def((name + "(" + more + row_loss_arguments + ") -> " + returns).c_str());
    };

    def("row_loss", "", "Tensor");

    // Training forward under "mean" and "sum": one read of the logits, one write of the gradient for upstream
    // gradient 1.
    def("row_loss_with_grad", "", "(Tensor loss, Tensor grad_logits)");

    // The same on the CPU, without tracing, into memory like that of the logits, which may be the logits themselves.
    def("row_loss_with_grad_", "Tensor(a!) grad_logits, ", "Tensor");

    // Training forward that saves a few numbers per row instead: stats is [numbers, rows], denominator 0-dim (the two
    // means) or empty.
    def("row_loss_with_stats", "", "(Tensor loss, Tensor stats, Tensor denominator)");

    // The same outside of traces: for margin losses on CUDA stats may have more rows, which hold a bit per logit. Then
    // backward reads no logits.
    def("row_loss_with_bits", "", "(Tensor loss, Tensor stats, Tensor denominator)");

    // Its backward, from the logits and stats. Stats of shape (0, rows) are those of a CUDA forward of short rows,
    // whose backward needs none; of shape (0,), with no denominator, of a forward that saved nothing: backward starts
    // from the logits alone, on CUDA for losses that are affine in the softmax.
    def("row_loss_backward", "Tensor grad_loss, Tensor stats, Tensor denominator, ", "Tensor");

    // The same pair for CUDA outside of traces. Forward writes the gradient for upstream gradient 1 and for a
    // denominator that it assumes; backward corrects it, at no cost where both were right.
    def("row_loss_with_stats_and_grad", "", "(Tensor loss, Tensor stats, Tensor denominator, Tensor grad_logits)");
    def("row_loss_backward_", "Tensor grad_loss, Tensor stats, Tensor denominator, Tensor(a!) grad_logits, ", "()");

    // For small calls on the CPU outside of traces, where torch takes longer to hand over the arguments than the loss
    // takes: constants is what row_loss_constants made of them.
    m.def(("row_loss_constants(" + constants + ") -> Tensor").c_str());
    m.def("row_loss.packed(Tensor logits, Tensor target, Tensor constants) -> Tensor");
    m.def(
        "row_loss_with_grad.packed(Tensor logits, Tensor target, Tensor constants) -> "
        "(Tensor loss, Tensor grad_logits)");

    // Losses of two labels a row, from one read: lam (one per row, else lam_of_all) times the loss of target, plus
    // the rest times that of other_target. Losses that are affine in the softmax only. Backward starts from the logits;
    // in place (CUDA) it completes what forward wrote, for that upstream gradient.
    const std::string labels = "Tensor other_target, Tensor? lam, float lam_of_all, ";
    def("mixed_loss", labels, "Tensor");
    def("mixed_loss_with_grad", labels, "(Tensor loss, Tensor upstream, Tensor grad_logits)");
    def("mixed_loss_backward", "Tensor grad_loss, " + labels, "Tensor");
    def("mixed_loss_backward_", "Tensor grad_loss, Tensor upstream, Tensor(a!) grad_logits, " + labels, "()");

    // What rows look like, from one read of the logits: log p of the target, largest probability, largest logit, the
    // target's logit less the largest other one, entropy; float32 (float64 for float64 logits), NaN for ignored rows.
    // argmax is int64. Rows are in logical order.
    m.def("row_statistics(Tensor logits, Tensor target, int ignore_index) -> (Tensor stats, Tensor argmax)");

    // The same from the read of a loss; class indices only.
    def("row_loss_and_statistics", "", "(Tensor loss, Tensor stats, Tensor argmax)");
    def("row_loss_with_grad_and_statistics", "", "(Tensor loss, Tensor grad_logits, Tensor stats, Tensor argmax)");

    // For multi-reduction losses on CUDA, whose backward needs what forward saves; traces have no bits.
    def("row_loss_with_stats_and_statistics", "",
        "(Tensor loss, Tensor stats, Tensor denominator, Tensor row_stats, Tensor argmax)");
    def("row_loss_with_bits_and_statistics", "",
        "(Tensor loss, Tensor stats, Tensor denominator, Tensor row_stats, Tensor argmax)");
    def("row_loss_with_stats_and_grad_and_statistics", "",
        "(Tensor loss, Tensor stats, Tensor denominator, Tensor grad_logits, Tensor row_stats, Tensor argmax)");

    // A step of early-learning regularisation (losses/elr.h) from one read of the logits and of memory [samples,
    // classes], float32 or bfloat16, which is written if it `updates`. place: where each row's sample is, int64 [rows];
    // order: row numbers by place, equal ones in their order, null if no sample has two rows (the CPU finds out by
    // itself). parameters: beta and lam on the device, in their place. values are [rows]; grad_logits, in float32
    // (float64) and empty unless asked for, is multiplied by scale [rows].
    m.def(
        "elr_rows_(Tensor logits, Tensor target, Tensor place, Tensor? order, Tensor(a!) memory, Tensor? parameters, "
        "Tensor? scale, float beta, float lam, int ignore_index, bool updates, bool with_grad) -> "
        "(Tensor values, Tensor grad_logits)");

    // Logits whose norm is fixed by a temperature, or at most the parameter if it `clips` (losses/rescale.h), in
    // float32 (float64), and the norms [rows]. Rows whose target is ignore_index become zeros. on_device: takes the
    // place of parameter. Backward makes the gradient in the logits of that in the rescaled ones, in the dtype of the
    // logits.
    const std::string rescale =
        "Tensor logits, Tensor? target, Tensor? on_device, float parameter, bool clips, int ignore_index) -> ";
    m.def(("rescale_logits(" + rescale + "(Tensor rescaled, Tensor norms)").c_str());
    m.def(("rescale_logits_backward(Tensor grad_rescaled, Tensor norms, " + rescale + "Tensor").c_str());

    // The generalised Jensen-Shannon divergence of a label and views of float32 or float64 logits: values [rows] and,
    // where there are grads, the gradient in each view. weights: the label's, then one per view. Every target is a
    // class.
    m.def("gjs_rows_(Tensor[] views, Tensor target, float[] weights, Tensor(a!)[] grads) -> Tensor");

    // ---- Z-Error (2506.02154) ----
    // Rows form groups and have scores, as `statistic` says:
    //   "class": target holds class indices; score is one number per row, or logits whose target's entry is the score
    //   "class_prob": the same, but the scores are exp(-score)
    //   "bce_logit", "bce_prob": score holds logits [N] or [N, ..., T], target labels in [0, 1] (NaN is missing), whose
    //   class is the nearer of 0 and 1; group 2 task + class
    //   "mse_target", "mse_loss", "mse_residual": score holds predictions, target numbers; group: the task
    // Count, mean and sum of squared deviations of every group's finite scores, float64 [3, num_classes]; zeros for a
    // group without rows. The same bits for any number of threads.
    m.def(
        "class_moments(Tensor score, Tensor target, SymInt num_classes, str statistic='class', int ignore_index=-100) "
        "-> Tensor");

    // How rows are judged, given their groups' moments, or by their own where those are absent. threshold: one number,
    // or (binary) one per label, replaced by threshold_tensor, 0-dim or one per group; tail: which scores are unlikely,
    // "both", "low" or "high"; groups with fewer than min_count rows are dropped unless keep_small; scores are
    // standardised, float64, empty unless asked for.
    const std::string rule =
        ", Tensor? moments, Tensor? threshold_tensor, float[] threshold, str statistic, str tail, int min_count, "
        "bool keep_small, bool with_scores) -> ";

    // Which rows are kept (classes only, moments given). kept_target (int64) is the target with ignore_index in dropped
    // rows.
    m.def(("z_error_mask(Tensor score, Tensor target, int ignore_index" + rule +
           "(Tensor mask, Tensor kept_target, Tensor scores)")
              .c_str());

    // The kept target alone, for small calls on the CPU: from logits [N, C] that are judged by themselves ("logit") or
    // by their probabilities ("prob") or cross entropies ("loss"). running, [3, C], is updated and then judges; where
    // it is absent, the rows' own moments do.
    m.def(
        "z_error_constants(float threshold, str statistic, str tail, int min_count, bool keep_small, int ignore_index, "
        "float momentum) -> Tensor");
    m.def("z_error_kept_target(Tensor logits, Tensor target, Tensor(a!)? running, Tensor constants) -> Tensor");

    // A row loss without its unlikely rows, from the rows' losses in `values`: statistics where moments are absent,
    // then mask and reduction in one pass. If values are `unweighted`, this multiplies them by the class weights, and
    // row_weight returns each row's factor; else it is empty. Two more statistics judge by the logits in score:
    // "class_cross_entropy" by their cross entropy, with label smoothing and bias but without class weights, and
    // "class_softmax" by exp(-that).
    m.def(("z_error_class_loss(Tensor values, Tensor score, Tensor target, SymInt num_classes, Tensor? weight, "
           "Tensor? sample_weight, Tensor? logit_bias_tensor, float label_smoothing, float logit_bias, "
           "bool unweighted, int ignore_index, str reduction" +
           rule +
           "(Tensor loss, Tensor denominator, Tensor mask, Tensor kept_target, Tensor scores, Tensor row_weight)")
              .c_str());

    // Mask and loss of the binary and the regression form in one pass. The mean divides by denominator, the sum of the
    // kept rows' sample weights. pos_weight: one, or one per task.
    m.def(("z_error_loss(Tensor input, Tensor target, Tensor? pos_weight, Tensor? sample_weight, str reduction" + rule +
           "(Tensor loss, Tensor denominator, Tensor mask, Tensor scores)")
              .c_str());

    m.def(
        "z_error_loss_backward(Tensor grad_loss, Tensor denominator, Tensor mask, str statistic, Tensor input, "
        "Tensor target, Tensor? pos_weight, Tensor? sample_weight, str reduction) -> Tensor");

    // Merges a batch's moments into running ones, which lose the share `momentum` of their weight first.
    m.def("update_moments_(Tensor(a!) running, Tensor batch, float momentum) -> ()");
}

namespace fused_losses {
namespace {

// An operator's entry is the same for every device.
void implement(Library& m) {
    implement_row_losses(m);
    implement_row_statistics(m);
    implement_elr(m);
    implement_gjs(m);
    implement_rescaling(m);
    implement_z_error(m);
}

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) { implement(m); }
#ifdef FL_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace fused_losses
