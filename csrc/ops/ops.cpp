// Every operator's schema.
//
// `loss` is a name of loss_names(), `params` its parameters in the order its header states. Losses are returned in
// float32 (float64 for float64 logits), gradients in the dtype of the logits. `reduction`: "none", "mean", "sum".
#include <torch/library.h>

TORCH_LIBRARY(fused_losses, m) {
    // What users call. Differentiable in logits by the fused kernels; anything beyond the first derivative in logits
    // (other inputs, second derivatives, forward mode, torch.func) goes through row_loss_reference.
    m.def(
        "row_loss(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? logit_bias_tensor, "
        "str loss, float[] params, float logit_bias, int ignore_index, str reduction) -> Tensor");

    // The same value by plain differentiable torch operations; implemented in Python next to each loss.
    m.def(
        "row_loss_reference(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, "
        "Tensor? logit_bias_tensor, str loss, float[] params, float logit_bias, int ignore_index, str reduction) "
        "-> Tensor");

    // Training forward under "mean" and "sum": one read of the logits, one write of the gradient for upstream
    // gradient 1.
    m.def(
        "row_loss_with_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, "
        "Tensor? logit_bias_tensor, str loss, float[] params, float logit_bias, int ignore_index, str reduction) "
        "-> (Tensor loss, Tensor grad_logits)");

    // Training forward that saves a few numbers per row instead: stats is [3 or 4, rows], denominator 0-dim ("mean") or
    // empty.
    m.def(
        "row_loss_with_stats(Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, "
        "Tensor? logit_bias_tensor, str loss, float[] params, float logit_bias, int ignore_index, str reduction) "
        "-> (Tensor loss, Tensor stats, Tensor denominator)");

    // Its backward: recomputes the probabilities from the logits and stats.
    m.def(
        "row_loss_backward(Tensor grad_loss, Tensor stats, Tensor denominator, Tensor logits, Tensor target, "
        "Tensor? weight, Tensor? sample_weight, Tensor? logit_bias_tensor, str loss, float[] params, "
        "float logit_bias, int ignore_index, str reduction) -> Tensor");
}
