// Tiles of whole rows in shared memory, each a warp's own: it brings one with accesses of 16 bytes, whatever the number
// of classes, while it works on another. The gradient takes the place of the logits and goes out the same way.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/register_words.cuh"

namespace fused_losses::cuda {

// Consecutive numbers, alike aligned in device and in shared memory, moved by a warp: whole accesses of 16 bytes, and
// the pairs of bytes beside them by a lane each.
// kAtOnce: accesses of a lane without a loop.
template <int kAtOnce>
class TileCopy {
public:
    // Asynchronous copies have 12 bits for a distance from an address, which is therefore amidst a lane's accesses.
    static constexpr int kAmidst = 2048;

    // ahead: bytes to the first whole access; from, to below: the lane's first access.
    FL_DEVICE TileCopy(int ahead, int bytes, int l)
        : lane(l), before(ahead), head(min(before, bytes)), rest(bytes - head) {}

    FL_DEVICE void begin_read(const char* amidst, char* to) const {
        each_access(amidst - kAmidst, to, [](const uint4* x, uint4* y) { __pipeline_memcpy_async(y, x, 16); });
    }
    FL_DEVICE void write(const char* from, char* to) const {
        each_access(from, to, [](const uint4* x, uint4* y) { *y = *x; });
    }

private:
    template <class Copy>
    FL_DEVICE void each_access(const char* from, char* to, Copy copy) const {
        auto* x = reinterpret_cast<const uint4*>(from);
        auto* y = reinterpret_cast<uint4*>(to);
        const int left = static_cast<int>(rest / 16) - lane;
        if (head != 0 || rest % 16 != 0) copy_beside(from - before - 16 * lane, to - before - 16 * lane);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (left > 32 * k) copy(x + 32 * k, y + 32 * k);
#pragma unroll 1
        for (int k = 32 * kAtOnce; k < left; k += 32) copy(x + k, y + k);
    }

    FL_DEVICE void copy_beside(const char* from, char* to) const {
        const int at = 2 * lane < head ? 2 * lane : 2 * lane + static_cast<int>(rest / 16 * 16);
        if (at < head + static_cast<int>(rest) && lane < 16)
            *reinterpret_cast<std::uint16_t*>(to + at) = *reinterpret_cast<const std::uint16_t*>(from + at);
    }

    const int lane, before, head;
    const unsigned rest;  // bytes from there on
};

// What the block has of dynamic shared memory beside its tiles.
FL_DEVICE void* behind_tiles(const RegisterPlan& plan) {
    return reinterpret_cast<char*>(dynamic_shared) + kTileThreads / 32 * 2 * plan.tile_bytes;
}

// Rows from a warp's tile to its next.
FL_DEVICE int tile_step(const RegisterPlan& plan) { return gridDim.x * (kTileThreads / 32) * plan.tile_rows; }

// Calls body(worker, first row, rows, tile, arrive) for the tiles of this warp, tile_step() rows apart, each of whose
// lanes calls arrive() before it reads. The worker is made by prepare(), while the first tile is on its way. kReads:
// whether there is something to read in a tile. kAccesses: that a lane has of most tiles.
template <int kAccesses, bool kReads = true, class Prepare, class Body>
FL_DEVICE void for_each_tile(const RegisterArgs& args, Prepare prepare, Body body) {
    const RowProblem& p = args.problem;
    const int me = threadIdx.x % 32, warp = threadIdx.x / 32, rows = static_cast<int>(p.inner);
    const int tile_rows = args.plan.tile_rows, row_bytes = args.plan.row_bytes;
    const int step = tile_step(args.plan);
    const auto rows_from = [&](int first) { return min(rows - first, tile_rows); };
    // Of every tile: their sizes are whole accesses.
    const int shift = misalignment(static_cast<const char*>(p.logits)), before = -shift & 15;
    using Copy = TileCopy<kAccesses>;
    const char* const amidst_logits = as_new(static_cast<const char*>(p.logits) + before + 16 * me + Copy::kAmidst);
    char* const grad = static_cast<char*>(p.grad) + before + 16 * me;
    char* tile = reinterpret_cast<char*>(dynamic_shared) + warp * 2 * args.plan.tile_bytes + shift;
    char* other = tile + args.plan.tile_bytes;
    const auto begin = [&](int first, char* to) {
        if (kReads) {
            const Copy copy(before, rows_from(first) * row_bytes, me);
            copy.begin_read(amidst_logits + std::int64_t(first) * row_bytes, to + before + 16 * me);
            __pipeline_commit();
        }
        // The labels, which may be none of no bytes. Beyond 32 bits this asks for less.
        const unsigned apart = args.plan.target_step;
        if (128u * me < apart * (rows_from(first) - 1) + args.plan.target_bytes)
            prefetch(static_cast<const char*>(p.target) + std::uint64_t(apart) * first + 128 * me);
    };
    int first = (blockIdx.x * (kTileThreads / 32) + warp) * tile_rows;
    if (first < rows) begin(first, tile);
    const auto worker = prepare();
    for (; first < rows; first += step) {
        const int count = rows_from(first);
        body(worker, first, count, tile, [&] {
            __pipeline_wait_prior(0);
            __syncwarp();
            if (first + step < rows) begin(first + step, other);
        });
        __syncwarp();
        if (args.writes_gradient) {
            const Copy copy(before, count * row_bytes, me);
            copy.write(tile + before + 16 * me, grad + std::int64_t(first) * row_bytes);
            __syncwarp();  // before the tile is read into again
        }
        char* const next = other;
        other = tile, tile = next;
    }
}

}  // namespace fused_losses::cuda
