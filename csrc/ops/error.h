// Errors of the operators. Types follow torch: IndexError for a class out of range, ValueError for batch sizes and
// value ranges, RuntimeError for shapes and dtypes. torch's bindings turn these standard exceptions into just those.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace fused_losses {

template <class Error, class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Error(text.str());
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
    if (!holds) [[unlikely]]
        fail<std::runtime_error>(parts...);
}

template <class... Parts>
void check_value(bool holds, const Parts&... parts) {
    if (!holds) [[unlikely]]
        fail<std::invalid_argument>(parts...);
}

template <class... Parts>
void check_index(bool holds, const Parts&... parts) {
    if (!holds) [[unlikely]]
        fail<std::out_of_range>(parts...);
}

// A class that is no class, in the words of every check of targets.
inline void check_class(bool holds, std::int64_t target, std::int64_t row, std::int64_t num_classes,
                        std::int64_t ignore_index) {
    check_index(holds, "target must be in [0, ", num_classes, ") or equal ignore_index=", ignore_index, ": Target ",
                target, " is out of bounds (row ", row, ")");
}

}  // namespace fused_losses
