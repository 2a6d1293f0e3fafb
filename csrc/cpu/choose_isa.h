// Which of the kernels' compilations this processor runs.
#pragma once

#include <ATen/Version.h>

#include <string>

#include "cpu/kernels.h"

namespace fused_losses {

// choose.operator()<isa>() for the best instruction set there is.
template <class Choose>
auto for_this_processor(Choose choose) {
    [[maybe_unused]] const std::string capability = at::get_cpu_capability();  // ATEN_CPU_CAPABILITY overrides
#ifdef FL_HAVE_AVX512
    if (capability == "AVX512") return choose.template operator()<Isa::avx512>();
#endif
#ifdef FL_HAVE_AVX2
    if (capability == "AVX2" || capability == "AVX512") return choose.template operator()<Isa::avx2>();
#endif
    return choose.template operator()<Isa::baseline>();
}

}  // namespace fused_losses
