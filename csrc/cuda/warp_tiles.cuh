// Tiles of whole rows in shared memory, each a warp's own: it brings one with accesses of 16 bytes, whatever the number
// of classes, while it works on another. The gradient takes the place of the logits and goes out the same way.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/register_launch.cuh"

namespace fused_losses::cuda {

extern __shared__ uint4 dynamic_shared[];

// Consecutive numbers, alike aligned in device and in shared memory, moved by a warp: whole accesses of 16 bytes, and
// the pairs of bytes beside them by a lane each.
class TileCopy {
    using Pair = std::uint16_t;
    static constexpr int n = kVector<Pair>;

public:
    FL_DEVICE TileCopy(const char* from, int bytes, int l)
        : lane(l),
          head(min(bytes / 2, -misalignment(reinterpret_cast<const Pair*>(from)) & (n - 1))),
          accesses(static_cast<unsigned>(bytes / 2 - head) / n) {
        const int at = lane < head ? lane : lane + accesses * n;
        extra = at < bytes / 2 && lane < 2 * n ? at : -1;
    }

    FL_DEVICE void begin_read(const char* from, char* to) const {
        const uint4* const x = whole(from);
        uint4* const y = const_cast<uint4*>(whole(to));
        each_access([&](int i) { __pipeline_memcpy_async(y + i, x + i, 16); });
        copy_extra(from, to);
    }
    FL_DEVICE void write(const char* from, char* to) const {
        const uint4* const x = whole(from);
        uint4* const y = const_cast<uint4*>(whole(to));
        each_access([&](int i) { y[i] = x[i]; });
        copy_extra(from, to);
    }

private:
    FL_DEVICE const uint4* whole(const char* x) const { return reinterpret_cast<const uint4*>(x + 2 * head) + lane; }

    FL_DEVICE void copy_extra(const char* from, char* to) const {
        if (extra >= 0) reinterpret_cast<Pair*>(to)[extra] = reinterpret_cast<const Pair*>(from)[extra];
    }

    template <class Body>
    FL_DEVICE void each_access(Body body) const {
        int i = 0, left = accesses - lane;
#pragma unroll 1
        for (; left > 96; left -= 128, i += 128) body(i), body(i + 32), body(i + 64), body(i + 96);
        if (left > 0) body(i);
        if (left > 32) body(i + 32);
        if (left > 64) body(i + 64);
    }

    const int lane, head, accesses;  // pairs before the accesses
    int extra;                       // of the pairs beside them the lane's own, or -1
};

// What the block has of dynamic shared memory beside its tiles.
FL_DEVICE void* behind_tiles(const RegisterPlan& plan) {
    return reinterpret_cast<char*>(dynamic_shared) + kTileThreads / 32 * 2 * plan.tile_bytes;
}

// Calls body(first row, rows, tile, arrive) for the tiles of this warp, each of whose lanes calls arrive() before it
// reads.
template <class Body>
FL_DEVICE void for_each_tile(const RegisterArgs& args, Body body) {
    const RowProblem& p = args.problem;
    const int me = threadIdx.x % 32, warp = threadIdx.x / 32, tile_rows = args.plan.tile_rows;
    const int row_bytes = static_cast<int>(p.num_classes) * bytes_of(p.dtype), rows = static_cast<int>(p.inner);
    const int step = gridDim.x * (kTileThreads / 32) * tile_rows;
    const auto rows_from = [&](int first) { return min(rows - first, tile_rows); };
    const auto memory_of = [&](int first) {
        return static_cast<const char*>(p.logits) + std::int64_t(first) * row_bytes;
    };
    int turn = 0;
    const auto tile_of = [&](const char* memory) {
        return reinterpret_cast<char*>(dynamic_shared) + (warp * 2 + turn) * args.plan.tile_bytes +
               reinterpret_cast<std::uintptr_t>(memory) % 16;
    };
    const auto begin = [&](int first) {
        const char* const from = memory_of(first);
        TileCopy(from, rows_from(first) * row_bytes, me).begin_read(from, tile_of(from));
        __pipeline_commit();
    };
    int first = (blockIdx.x * (kTileThreads / 32) + warp) * tile_rows;
    if (first < rows) begin(first);
    for (; first < rows; first += step) {
        char* const tile = tile_of(memory_of(first));
        const int count = rows_from(first);
        body(first, count, tile, [&] {
            __pipeline_wait_prior(0);
            __syncwarp();
            turn ^= 1;
            if (first + step < rows) begin(first + step);
        });
        __syncwarp();
        if (p.grad) {
            char* const to = static_cast<char*>(p.grad) + std::int64_t(first) * row_bytes;
            TileCopy(to, count * row_bytes, me).write(tile, to);
            __syncwarp();  // before the tile is read into again
        }
    }
}

}  // namespace fused_losses::cuda
