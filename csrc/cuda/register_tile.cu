// Softmax losses of rows of up to 256 classes: a warp brings a tile of whole rows to shared memory with accesses of 16
// bytes, whatever the number of classes, while it works on another; a row is then in the registers of one to 32 lanes.
// Forward with its gradient, or backward alone.
#include "cuda/register_row.cuh"
#include "cuda/warp_tiles.cuh"

namespace fused_losses::cuda {
namespace {

// The lane's part of a row in a tile.
template <class Stored>
class TilePlace {
    static constexpr int n = Word<Stored>::count;

public:
    const bool exists;
    int left;

    FL_DEVICE TilePlace(const RegisterArgs& a, int l, Stored* tile, int at, bool there)
        : exists(there), args(a), lane(l), row(tile + at), skip(n == 1 ? 0 : (misalignment(tile) + at) & (n - 1)) {
        left = min(static_cast<int>(static_cast<unsigned>(classes() - skip) / n) - lane * args.plan.rounds,
                   args.plan.rounds);
    }

    FL_DEVICE const Stored* logits() const { return row; }
    FL_DEVICE Stored* grad() const { return row; }
    FL_DEVICE const unsigned* from() const { return to(); }
    FL_DEVICE unsigned* to() const { return reinterpret_cast<unsigned*>(row + skip) + lane * args.plan.rounds; }
    static FL_DEVICE int step() { return 1; }
    FL_DEVICE int first() const { return skip + lane * args.plan.rounds * n; }
    // A row of an odd number of classes has one of them.
    FL_DEVICE int extra() const { return lane > 0 || classes() % n == 0 ? -1 : (skip > 0 ? 0 : classes() - 1); }
    FL_DEVICE bool owns(int) const { return lane == 0; }

private:
    FL_DEVICE int classes() const { return static_cast<int>(args.problem.num_classes); }

    const RegisterArgs& args;
    const int lane;
    Stored* const row;
    const int skip;
};

template <class Stored, bool kFactors, int kHeld>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(kHeld, kFactors))
    softmax_in_tiles(const __grid_constant__ RegisterArgs args) {
    const RowProblem& p = args.problem;
    if (args.is_saved && is_already_written<float>(p)) return;
    const int classes = static_cast<int>(p.num_classes);
    LaneTeam team(args.plan.lanes);
    __shared__ LossSums of_thread[kTileThreads];
    LossSums& sums = of_thread[threadIdx.x];  // registers have other uses
    sums = {0, 0};
    const RegisterRow<Stored, kFactors, unsigned, kHeld / Word<Stored>::count, LaneTeam> worker(args, sums);
    for_each_tile(args, [&](int first, int count, char* bytes, auto arrive) {
        Stored* const tile = reinterpret_cast<Stored*>(bytes);
        const int own = threadIdx.x % 32 / team.lanes, at_once = 32 / team.lanes;
        PackedTarget next(args, first + own, own < count);
        arrive();
#pragma unroll 1
        for (int r = own; r - own < count; r += at_once) {
            const bool exists = r < count;
            const PackedTarget target = next;
            next = PackedTarget(args, first + r + at_once, r + at_once < count);
            worker.run(team, first + r, target,
                       TilePlace<Stored>(args, team.lane, tile, exists ? r * classes : 0, exists));
        }
    });
    write_loss(args, sums);
}

}  // namespace

template <class Stored, bool kFactors>
cudaError_t enqueue_tiles(RegisterArgs& args, cudaStream_t stream) {
    const auto with = [&]<int kHeld>() {
        return launch_tiles_resident(&softmax_in_tiles<Stored, kFactors, kHeld>, args, stream);
    };
    if constexpr (kFactors)
        return with.template operator()<kTileHeldWithFactors>();
    else
        switch (args.plan.held) {
            case 10: return with.template operator()<10>();
            case 16: return with.template operator()<16>();
            case 20: return with.template operator()<20>();
            default: return with.template operator()<26>();
        }
}

#define FL_TILES(Stored)                                                            \
    template cudaError_t enqueue_tiles<Stored, false>(RegisterArgs&, cudaStream_t); \
    template cudaError_t enqueue_tiles<Stored, true>(RegisterArgs&, cudaStream_t);
FL_TILES(float)
FL_TILES(Half)
FL_TILES(BFloat16)

}  // namespace fused_losses::cuda
