// Calls of the row-loss operators.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/args.h"

namespace fused_losses {

// An operator whose parameters are Extra... followed by those of RowLossArgs.
template <class Return, class... Extra>
class Operator {
    template <class... A>
    using Handle = c10::TypedOperatorHandle<Return(Extra..., A...)>;

    template <class... A>
    struct Find {
        static auto handle(const char* name) {
            return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Return(Extra..., A...)>();
        }
    };

public:
    explicit Operator(const char* name) : handle(WithRowLossArgs<Find>::handle(name)) {}

    Return operator()(Extra... extra, const RowLossArgs& a) const {
        return handle.call(extra..., a.logits, a.target, a.weight, a.sample_weight, a.logit_bias_tensor, a.margin,
                           a.loss, a.params, a.logit_bias, a.ignore_index, a.reduction);
    }

private:
    WithRowLossArgs<Handle> handle;
};

}  // namespace fused_losses
