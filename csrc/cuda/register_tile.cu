// Softmax losses of rows of up to 400 classes. Forward with its gradient, or backward alone.
#include "cuda/register_row.cuh"
#include "cuda/register_tile.cuh"

namespace fused_losses::cuda {
namespace {

template <class Stored, KernelKind kKind, int kLanes, int kHeld>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(kKind, kHeld))
    softmax_in_tiles(const __grid_constant__ RegisterArgs args) {
    constexpr int rounds = kHeld / Word<Stored>::count, always = TileKernel{kKind, kLanes, kHeld}.always(rounds);
    work_on_register_tiles<RegisterRow<Stored, kKind, unsigned, rounds, always, LaneTeam<kLanes>>>(args);
}

}  // namespace

template <class Stored>
cudaError_t enqueue_tiles(RegisterArgs& args, cudaStream_t stream) {
    const auto launch = [&]<TileKernel kernel>()
        requires(!is_multi_reduction(kernel.kind))
    { return launch_tiles_resident(&softmax_in_tiles<Stored, kernel.kind, kernel.lanes, kernel.held>, args, stream); };
    return launch_planned<kTileKernels>(args.plan, launch);
}

#define FL_TILES(Stored) template cudaError_t enqueue_tiles<Stored>(RegisterArgs&, cudaStream_t);
FL_TILES(float)
FL_TILES(Half)
FL_TILES(BFloat16)

}  // namespace fused_losses::cuda
