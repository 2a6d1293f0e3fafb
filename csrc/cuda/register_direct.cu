// Softmax losses of rows that are longer than a few lanes can hold. Forward with its gradient, or backward alone.
#include "cuda/register_direct.cuh"
#include "cuda/register_row.cuh"

namespace fused_losses::cuda {
namespace {

template <KernelKind kKind, int kHeld, class Team>
constexpr DirectKernel kKernel{kKind, std::is_same_v<Team, WarpTeam>, kHeld};

template <class Stored, KernelKind kKind, int kHeld, class Team>
__global__ void __launch_bounds__((kKernel<kKind, kHeld, Team>.most_threads(sizeof(Stored))),
                                  (kKernel<kKind, kHeld, Team>.blocks()))
    softmax_in_registers(const __grid_constant__ RegisterArgs args) {
    constexpr int rounds = kHeld / kVector<Stored>, always = kKernel<kKind, kHeld, Team>.always(rounds);
    work_on_direct_rows<RegisterRow<Stored, kKind, uint4, rounds, always, Team>>(args);
}

}  // namespace

template <class Stored>
cudaError_t enqueue_direct(RegisterArgs& args, cudaStream_t stream) {
    const auto launch = [&]<DirectKernel kernel>()
        requires(!is_multi_reduction(kernel.kind))
    {
        using Team = std::conditional_t<kernel.of_warps, WarpTeam, BlockTeam>;
        return launch_rows_resident(&softmax_in_registers<Stored, kernel.kind, kernel.held, Team>, args, stream,
                                    args.out.follows_weights);
    };
    return launch_planned<kDirectKernels>(args.plan, launch);
}

#define FL_DIRECT(Stored) template cudaError_t enqueue_direct<Stored>(RegisterArgs&, cudaStream_t);
FL_DIRECT(float)
FL_DIRECT(Half)
FL_DIRECT(BFloat16)

}  // namespace fused_losses::cuda
