// Every operator's schema.
//
// `loss` is a name of loss_names(), `params` its parameters in the order its header states. Losses are returned in
// float32 (float64 for float64 logits), gradients in the dtype of the logits. `reduction`: "none", "mean", "sum",
// for margin losses also "active_mean", over the rows whose loss is positive.
#include <torch/library.h>

#include <string>

TORCH_LIBRARY(fused_losses, m) {
    const std::string row_loss_arguments =
        "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight, Tensor? logit_bias_tensor, "
        "Tensor? margin, str loss, float[] params, float logit_bias, int ignore_index, str reduction";
    const auto def = [&](const std::string& name, const std::string& more, const std::string& returns) {
        m.def((name + "(" + more + row_loss_arguments + ") -> " + returns).c_str());
    };

    // What users call. Differentiable in logits by the fused kernels; anything beyond the first derivative in logits
    // (other inputs, second derivatives, forward mode, torch.func) goes through row_loss_reference.
    def("row_loss", "", "Tensor");

    // The same value by plain differentiable torch operations; implemented in Python next to each loss.
    def("row_loss_reference", "", "Tensor");

    // Training forward under "mean" and "sum": one read of the logits, one write of the gradient for upstream
    // gradient 1.
    def("row_loss_with_grad", "", "(Tensor loss, Tensor grad_logits)");

    // Training forward that saves a few numbers per row instead: stats is [numbers, rows], denominator 0-dim (the two
    // means) or empty.
    def("row_loss_with_stats", "", "(Tensor loss, Tensor stats, Tensor denominator)");

    // Its backward, from the logits and stats.
    def("row_loss_backward", "Tensor grad_loss, Tensor stats, Tensor denominator, ", "Tensor");
}
