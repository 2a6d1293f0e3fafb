// The parameters that all row-loss operators share.
#pragma once

#include "core/row_problem.h"
#include "losses/names.h"
#include "losses/needs.h"
#include "ops/packed.h"
#include "ops/stack.h"

namespace fused_losses {

// What a call says besides its tensors. torch takes longer to hand it over than a small loss does to compute, so it may
// come as one tensor that holds this struct.
struct RowLossConstants {
    int loss = -1;  // index into CompiledLosses; -1: none of them
    Reduction reduction = Reduction::kMean;
    int num_params = 0;
    std::array<double, 8> params{};
    double logit_bias = 0;
    std::int64_t ignore_index = -100;

    // In the order of the schema.
    static RowLossConstants read(Arguments& in) {
        std::string loss, reduction;
        Numbers params;
        RowLossConstants constants;
        in.read(loss, params, constants.logit_bias, constants.ignore_index, reduction);
        constants.loss = index_of(CompiledLosses{}, loss);
        check_value(constants.loss >= 0, "loss must be one of the names in loss_names(), got '", loss, "'");
        const LossNeeds needs = needs_of(constants.loss);
        check_value(params.count == static_cast<std::size_t>(needs.num_params), loss, ": params must hold ",
                    needs.num_params, " numbers, got ", params.count);
        constants.num_params = needs.num_params;
        constants.params = params.values;
        constants.reduction = parse_reduction(loss, needs, reduction);
        return constants;
    }

    static RowLossConstants unpack(const Tensor& packed) {
        const auto constants = fused_losses::unpack<RowLossConstants>(packed);
        check(constants && constants->is_possible(), "constants must come from row_loss_constants");
        return *constants;
    }

private:
    bool is_possible() const {
        if (loss < 0 || loss >= CompiledLosses::size) return false;
        const LossNeeds needs = needs_of(loss);
        const Reduction last = needs.has_margin ? Reduction::kActiveMean : Reduction::kMean;
        return num_params == needs.num_params && reduction <= last;
    }

    static Reduction parse_reduction(const std::string& loss, const LossNeeds& needs, const std::string& reduction) {
        if (reduction == "active_mean" && needs.has_margin) return Reduction::kActiveMean;
        if (reduction == "mean") return Reduction::kMean;
        if (reduction == "sum") return Reduction::kSum;
        check_value(reduction == "none", loss, ": reduction must be ",
                    needs.has_margin ? "'none', 'mean', 'sum' or 'active_mean'" : "'none', 'mean' or 'sum'", ", got '",
                    reduction, "'");
        return Reduction::kNone;
    }
};

struct RowLossArgs {
    Tensor logits;                     // [C], [N, C] or [N, C, d1, ...]
    Tensor target;                     // class indices without the class dimension, or probabilities like logits
    OptionalTensor weight;             // [C]
    OptionalTensor sample_weight;      // one per row: the shape of class indices
    OptionalTensor logit_bias_tensor;  // 0-dim; takes the place of logit_bias
    OptionalTensor first_param;        // takes the place of params[0]: 0-dim, of margin losses also [C]
    RowLossConstants constants;
    const char* loss = "";  // its name, for messages

    RowLossArgs() = default;
    explicit RowLossArgs(Arguments& in) {
        in.read(logits, target, weight, sample_weight, logit_bias_tensor, first_param);
        take(RowLossConstants::read(in));
    }

    // Of the overloads called "packed".
    static RowLossArgs packed(Arguments& in) {
        RowLossArgs args;
        Tensor constants;
        in.read(args.logits, args.target, constants);
        args.take(RowLossConstants::unpack(constants));
        return args;
    }

private:
    void take(const RowLossConstants& given) {
        constants = given;
        loss = name_of(CompiledLosses{}, given.loss);
    }
};

// A second label for every row.
struct OtherLabel {
    OptionalTensor target;  // as the first one's
    OptionalTensor lam;     // what the first label counts, one per row; takes the place of lam_of_all
    double lam_of_all = 1;  // the second one counts the rest

    OtherLabel() = default;
    explicit OtherLabel(Arguments& in) { in.read(Required{target}, lam, lam_of_all); }
};

}  // namespace fused_losses
