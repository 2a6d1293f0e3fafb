// Chooses the instruction set whose kernels this process runs.
#pragma once

#include <cstdlib>
#include <string_view>

#include "cpu/kernels.h"

namespace fused_losses {

// The best one that the processor and its operating system support. The environment variable ATEN_CPU_CAPABILITY, which
// torch reads as well, asks for an older one: "default" or "avx2".
inline Isa isa_of_this_processor() {
    [[maybe_unused]] const char* const asked = std::getenv("ATEN_CPU_CAPABILITY");
    [[maybe_unused]] const std::string_view limit = asked ? asked : "";
#ifdef FL_HAVE_AVX2
    __builtin_cpu_init();
    const auto has = [](auto... features) { return (features && ...); };
    const bool avx2 =
        has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"));
    const bool avx512 = avx2 && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                                    __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"));
    if (avx512 && limit != "avx2" && limit != "default") return Isa::avx512;
    if (avx2 && limit != "default") return Isa::avx2;
#endif
    return Isa::baseline;
}

// choose.operator()<isa>() for the best instruction set there is.
template <class Choose>
auto for_this_processor(Choose choose) {
    switch (isa_of_this_processor()) {
#ifdef FL_HAVE_AVX2
        case Isa::avx512: return choose.template operator()<Isa::avx512>();
        case Isa::avx2: return choose.template operator()<Isa::avx2>();
#endif
        default: return choose.template operator()<Isa::baseline>();
    }
}

}  // namespace fused_losses
