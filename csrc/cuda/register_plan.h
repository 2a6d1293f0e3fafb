// Which rows of softmax losses stay in registers from their only read to the write of their gradient, and who shares
// them. Host code.
#pragma once

#include "cuda/launch.h"

namespace fused_losses::cuda {

// How many numbers of its row a thread may hold, with all else in 64 or 80 registers: half, or three eighths, of the
// threads that a multiprocessor can have are there. Kernels are compiled for each: a loop that ends early would cost as
// much as what it leaves out.
constexpr int kTileHeld[] = {10, 16, 20, 26}, kDirectHeld[] = {16, 24, 32};
constexpr int kTileHeldWithFactors = 16, kDirectHeldWithFactors = 16;
constexpr int kTileThreads = 128, kMostColumnThreads = 384, kColumnHeld = 16;

// What a block may have where rows are read straight from memory: addresses of as many loads as a float row needs take
// more registers.
constexpr int most_direct_threads(int element) { return element == 4 ? 512 : 640; }

// Blocks of a tile's kernel that fit on a multiprocessor by their registers, and what a tile may take then.
constexpr int tile_blocks(int held, bool factor) { return held < 16 && !factor ? 8 : held > 20 ? 5 : 6; }
constexpr int most_tile_bytes(int held, bool factor) { return tile_blocks(held, factor) == 8 ? 3072 : 4096; }

// Whether u_j are read: they may be left out, or 1 for all classes.
inline bool reads_u(const RowProblem& p) {
    return p.class_factors == ClassFactors::kSoftTarget ||
           (p.class_factors == ClassFactors::kClassWeights && p.class_weight);
}

struct RegisterPlan {
    // Of a row: a power of two up to 32 in a tile; else a warp or a block, of a cluster perhaps.
    int lanes = 0;
    int held = 0;                       // numbers that the kernel has room for
    int rounds = 0;                     // accesses of a lane in a tile, of 4 bytes
    int share = 0;                      // accesses of a block of a cluster, of 16 bytes
    int tile_rows = 0, tile_bytes = 0;  // of a warp's tile; all zeros: rows are read where they lie
    int threads = 0, cluster = 1;       // of a block, blocks of a row
    bool is_column = false;             // neighbouring threads have neighbouring rows
    bool is_paired = false;             // two rows of 16-bit numbers are four aligned bytes, for every class
    int pitch = 0, slot_bytes = 0;      // numbers of a thread in shared memory, bytes of a block
    bool is_ragged = false;             // some rows have numbers beside their whole accesses

    explicit operator bool() const { return lanes > 0; }
};

// For rows that tiles can hold, none else. And how many lanes ask the same bank of shared memory at the same time.
RegisterPlan plan_tiles(const RowProblem& p, int multiprocessors);
int conflicts_of(const RowProblem& p, const RegisterPlan& plan);

// For longer ones, with clusters of up to so many blocks.
RegisterPlan plan_direct(const RowProblem& p, int largest_cluster);

// For rows that lie side by side.
RegisterPlan plan_columns(const RowProblem& p);

// The same for losses of several passes, which have their numbers in shared memory, `slots` to a class: rows in tiles,
// and rows that lie anyhow.
RegisterPlan plan_pass_tiles(const RowProblem& p, int slots, int multiprocessors);
RegisterPlan plan_pass_rows(const RowProblem& p, int slots, int largest_cluster);

// For rows of any length that lie anyhow: threads have a few of their numbers at a time.
RegisterPlan plan_any_rows(const RowProblem& p, int slots);

}  // namespace fused_losses::cuda
