// Softmax losses of rows of up to 256 classes: a warp brings a tile of whole rows to shared memory with accesses of 16
// bytes, whatever the number of classes, while it works on another; a row is then in the registers of one to 32 lanes.
// Forward with its gradient, or backward alone.
#include <cuda_pipeline.h>

#include "cuda/register_row.cuh"

namespace fused_losses::cuda {
namespace {

// Lanes of a warp that share a row; all lanes of the warp take part.
struct LaneTeam {
    const int lanes, lane;
    const bool leads;

    FL_DEVICE explicit LaneTeam(int count) : lanes(count), lane(threadIdx.x % count), leads(lane == 0) {}

    FL_DEVICE float larger(float x) const {
        return reduce(x, [](float a, float b) { return std::fmax(a, b); });
    }
    FL_DEVICE float sum(float x, int = 0) const { return reduce(x, Plus()); }
    FL_DEVICE void sync() const {
        if (lanes > 1) __syncwarp();
    }

private:
    template <class Combine>
    FL_DEVICE float reduce(float x, Combine combine) const {
#pragma unroll 1
        for (int distance = lanes / 2; distance > 0; distance /= 2)
            x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance));
        return x;
    }
};

// Consecutive numbers, alike aligned in device and in shared memory, moved by a warp: whole accesses of 16 bytes, and
// what is beside them by a lane each.
template <class Stored>
class Run {
    static constexpr int n = kVector<Stored>;

public:
    FL_DEVICE Run(const Stored* from, int count, int l)
        : lane(l), head(min(count, -misalignment(from) & (n - 1))), accesses(static_cast<unsigned>(count - head) / n) {
        const int at = lane < head ? lane : lane + accesses * n;
        extra = at < count && lane < 2 * n ? at : -1;
    }

    FL_DEVICE void begin_copy(const Stored* from, Stored* to) const {
        const uint4* const x = reinterpret_cast<const uint4*>(from + head) + lane;
        uint4* const y = reinterpret_cast<uint4*>(to + head) + lane;
        each_access([&](int i) { __pipeline_memcpy_async(y + i, x + i, 16); });
        if (extra >= 0) to[extra] = from[extra];
    }
    FL_DEVICE void write(const Stored* from, Stored* to) const {
        const uint4* const x = reinterpret_cast<const uint4*>(from + head) + lane;
        uint4* const y = reinterpret_cast<uint4*>(to + head) + lane;
        each_access([&](int i) { y[i] = x[i]; });
        if (extra >= 0) to[extra] = from[extra];
    }

private:
    template <class Body>
    FL_DEVICE void each_access(Body body) const {
        int i = 0, left = accesses - lane;
#pragma unroll 1
        for (; left > 96; left -= 128, i += 128) body(i), body(i + 32), body(i + 64), body(i + 96);
        if (left > 0) body(i);
        if (left > 32) body(i + 32);
        if (left > 64) body(i + 64);
    }

    const int lane, head, accesses;  // numbers before the accesses
    int extra;                       // of the numbers beside them the lane's own, or -1
};

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

template <class Stored, bool kSpread, int kHeld>
__global__ void __launch_bounds__(kTileThreads, tile_blocks(kHeld, kSpread))
    softmax_in_tiles(const __grid_constant__ RegisterArgs args) {
    const RowProblem& p = args.problem;
    if (args.is_saved && is_already_written<float>(p)) return;
    const int me = threadIdx.x % 32, classes = static_cast<int>(p.num_classes), tile_rows = args.plan.tile_rows;
    LaneTeam team(args.plan.lanes);
    __shared__ LossSums of_thread[kTileThreads];
    LossSums& sums = of_thread[threadIdx.x];  // registers have other uses
    sums = {0, 0};
    const RegisterRow<Stored, kSpread, unsigned, kHeld / Word<Stored>::count, LaneTeam> worker(args, sums);
    const int rows = static_cast<int>(p.inner), step = gridDim.x * (kTileThreads / 32) * tile_rows;
    const auto rows_from = [&](int first) { return min(rows - first, tile_rows); };
    int turn = 0;
    // The tile whose first row in memory is this.
    const auto tile_of = [&](const Stored* memory) {
        const int number = threadIdx.x / 32 * 2 + turn;
        return reinterpret_cast<Stored*>(reinterpret_cast<char*>(dynamic_shared) + number * args.plan.tile_bytes) +
               misalignment(memory);
    };
    const auto begin = [&](int first) {
        const Stored* const from = as<Stored>(p.logits) + std::int64_t(first) * classes;
        Run<Stored>(from, rows_from(first) * classes, me).begin_copy(from, tile_of(from));
        __pipeline_commit();
    };
    int first = (blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32) * tile_rows;
    if (first < rows) begin(first);
    for (; first < rows; first += step) {
        Stored* const tile = tile_of(as<Stored>(p.logits) + std::int64_t(first) * classes);
        const int count = rows_from(first), own = me / team.lanes, at_once = 32 / team.lanes;
        PackedTarget next(args, first + own, own < count);
        __pipeline_wait_prior(0);
        __syncwarp();
        turn ^= 1;
        if (first + step < rows) begin(first + step);
#pragma unroll 1
        for (int r = own; r - own < count; r += at_once) {
            const bool exists = r < count;
            const PackedTarget target = next;
            next = PackedTarget(args, first + r + at_once, r + at_once < count);
            worker.run(team, first + r, target,
                       TilePlace<Stored>(args, team.lane, tile, exists ? r * classes : 0, exists));
        }
        __syncwarp();
        if (p.grad) {
            Stored* const to = static_cast<Stored*>(p.grad) + std::int64_t(first) * classes;
            Run<Stored>(to, count * classes, me).write(tile, to);
            __syncwarp();  // before the tile is read into again
        }
    }
    write_loss(args, sums);
}

}  // namespace

template <class Stored, bool kSpread>
cudaError_t enqueue_tiles(RegisterArgs& args, cudaStream_t stream) {
    const RegisterPlan& plan = args.plan;
    constexpr int warps = kTileThreads / 32;
    const std::int64_t tiles = (args.problem.rows() + plan.tile_rows - 1) / plan.tile_rows;
    const auto with = [&]<int kHeld>() {
        return launch_all_resident(&softmax_in_tiles<Stored, kSpread, kHeld>,
                                   {kTileThreads, warps * 2 * plan.tile_bytes, 1}, (tiles + warps - 1) / warps, stream,
                                   args);
    };
    if constexpr (kSpread)
        return with.template operator()<kTileHeldWithSpread>();
    else
        switch (plan.held) {
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
