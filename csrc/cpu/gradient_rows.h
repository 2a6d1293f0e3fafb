// Where a tile's gradient rows are written: to the caller's memory, or to scratch if the gradient is so large that
// stores past the caches pay. From scratch whole cache lines are stored while the next tile is computed.
#pragma once

#include "cpu/row_buffer.h"
#include "cpu/scratch.h"

namespace fused_losses {
inline namespace FL_ISA {

class GradientRows {
    // An ordinary store first reads the cache line that it overwrites. For less memory than this, or shorter rows, this
    // cost no time: the allocator then hands out memory that is in a cache, or that the system has just cleared.
    static constexpr std::int64_t kStreamedBytes = 64 << 20, kStreamedRow = 16 << 10;

public:
    GradientRows(const RowProblem& problem, std::int64_t tile_rows)
        : p(problem),
          row_bytes(p.num_classes * bytes_of(p.dtype)),
          streams(p.grad && p.grad_class_stride == 1 && p.grad_stride.inner == p.num_classes &&
                  row_bytes >= kStreamedRow && p.rows() * row_bytes >= kStreamedBytes),
          tile_bytes(tile_rows * row_bytes),
          scratch(streams ? 2 * tile_bytes : 0) {}

    ~GradientRows() {
        lines.send_all();
        if (streams) stream_fence();
    }

    // Where the gradient of row `number` of image `outer` is to be written, the i-th row of its tile.
    template <class Stored>
    Stored* row(std::int64_t outer, std::int64_t number, int i) const {
        if (!streams) return grad_at<Stored>(p, outer, number);
        return reinterpret_cast<Stored*>(scratch.data() + turn * tile_bytes + i * row_bytes);
    }

    // Memory worth fetching before the row is written; null if there is none.
    template <class Stored>
    const Stored* to_fetch(std::int64_t outer, std::int64_t number) const {
        return p.grad && !streams ? grad_at<Stored>(p, outer, number) : nullptr;
    }

    // To be called when the gradient of the tile's rows [first, first + n) is complete.
    template <class Stored>
    void finish(std::int64_t outer, std::int64_t first, int n) {
        if (!streams) return;
        lines.send_all();
        lines = begin_stream(grad_at<Stored>(p, outer, first), row<Stored>(outer, first, 0), n * p.num_classes);
        turn = 1 - turn;
    }

    Lines lines;  // of the previous tile

private:
    const RowProblem& p;
    const std::int64_t row_bytes;
    const bool streams;
    const std::int64_t tile_bytes;
    const Scratch<char> scratch;  // of two tiles
    int turn = 0;
};

}  // namespace FL_ISA
}  // namespace fused_losses
