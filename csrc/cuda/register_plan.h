// Which rows of softmax losses stay in registers from their only read to the write of their gradient, and who shares
// them. Host code.
#pragma once

#include "cuda/launch.h"

namespace fused_losses::cuda {

constexpr int kTileThreads = 128, kMostColumnThreads = 384;

// What a tile may take. Fewer threads with larger tiles have as many bytes on their way as more threads have with
// smaller ones, and what is done once for a tile costs less.
constexpr int most_tile_bytes(int held) { return held < 16 ? 3072 : 5120; }

// What a kernel is compiled for.
enum class KernelKind {
    // Softmax losses, by the u_j of a row.
    kNoFactors,    // not used
    kUnitFactors,  // 1 for all classes, or not used
    kReadFactors,
    kStatistics,  // as kUnitFactors, with row statistics: forward, without a bias
    // Multi-reduction losses, by the numbers that they keep of each class.
    kOneKept,
    kTwoKept
};

constexpr bool is_multi_reduction(KernelKind kind) { return kind >= KernelKind::kOneKept; }

inline KernelKind kind_of(const RowProblem& p) {
    if (p.class_factors == ClassFactors::kNone) return KernelKind::kNoFactors;
    const bool are_read = p.class_factors == ClassFactors::kSoftTarget || p.class_weight;
    return p.class_factors == ClassFactors::kOnes || !are_read ? KernelKind::kUnitFactors : KernelKind::kReadFactors;
}

// Blocks of a tile's kernel that fit on a multiprocessor by their registers: with more of them, numbers are spilled.
constexpr int tile_blocks(KernelKind kind, int held) {
    using enum KernelKind;
    if (held < 16) return kind == kOneKept || kind == kNoFactors ? 8 : kind == kStatistics ? 6 : 7;
    if (kind == kNoFactors) return held == 20 ? 7 : held == 26 ? 6 : 5;
    return kind == kOneKept ? 5 : 4;
}

// Kernels are compiled for so many numbers of a thread: a loop that ends early would cost as much as what it leaves
// out. Of the accesses that these take, the first always() are there for every lane and row that the kernel is given.
struct TileKernel {
    KernelKind kind;
    int lanes, held;  // lanes of a row, 0: any number

    // Whether a number beside the words of a row has a place.
    constexpr bool takes_ragged() const { return !is_multi_reduction(kind) || lanes == 0; }
    constexpr int always(int rounds) const {
        if (kind != KernelKind::kNoFactors && !is_multi_reduction(kind)) return 0;
        return held == 10 ? 1 : rounds * 11 / 20;
    }
};
constexpr TileKernel kTileKernels[] = {
    {KernelKind::kNoFactors, 1, 10},   {KernelKind::kNoFactors, 1, 20},   {KernelKind::kNoFactors, 1, 34},
    {KernelKind::kNoFactors, 2, 26},   {KernelKind::kNoFactors, 2, 34},   {KernelKind::kNoFactors, 4, 26},
    {KernelKind::kNoFactors, 8, 20},   {KernelKind::kNoFactors, 8, 34},   {KernelKind::kNoFactors, 16, 26},
    {KernelKind::kUnitFactors, 1, 10}, {KernelKind::kUnitFactors, 0, 26}, {KernelKind::kReadFactors, 0, 16},
    {KernelKind::kStatistics, 1, 10},  {KernelKind::kStatistics, 0, 26},  {KernelKind::kOneKept, 1, 10},
    {KernelKind::kOneKept, 0, 10},     {KernelKind::kOneKept, 0, 26},     {KernelKind::kTwoKept, 1, 10},
    {KernelKind::kTwoKept, 0, 10},     {KernelKind::kTwoKept, 0, 26},
};
struct DirectKernel {
    KernelKind kind;
    bool of_warps;  // a row each; else of blocks
    int held;

    constexpr int always(int rounds) const {
        return kind == KernelKind::kNoFactors ? rounds / 2 : is_multi_reduction(kind) ? rounds / 4 : 0;
    }
    // That fit on a multiprocessor, as tile_blocks().
    constexpr int blocks() const {
        if (!of_warps) return 1;
        return kind == KernelKind::kNoFactors ? 6 : kind == KernelKind::kReadFactors ? 3 : 4;
    }
    // Of a block: addresses of as many loads as a float row needs take more registers, and so do sums with factors.
    constexpr int most_threads(int element) const {
        if (of_warps) return kTileThreads;
        if (held > 32) return element == 4 ? 384 : 512;
        return element == 4 || kind != KernelKind::kNoFactors ? 512 : 640;
    }
};
constexpr DirectKernel kDirectKernels[] = {
    {KernelKind::kNoFactors, true, 24},   {KernelKind::kNoFactors, true, 32},    {KernelKind::kNoFactors, false, 32},
    {KernelKind::kNoFactors, false, 64},  {KernelKind::kUnitFactors, true, 32},  {KernelKind::kUnitFactors, false, 32},
    {KernelKind::kReadFactors, true, 32}, {KernelKind::kReadFactors, false, 16}, {KernelKind::kStatistics, true, 32},
    {KernelKind::kStatistics, false, 24}, {KernelKind::kOneKept, true, 32},      {KernelKind::kOneKept, false, 32},
    {KernelKind::kTwoKept, true, 32},     {KernelKind::kTwoKept, false, 16},
};

// For rows side by side: a thread has so many classes of a row at most, and the first always() of them.
struct ColumnKernel {
    KernelKind kind;
    int held;

    constexpr int always() const { return kind != KernelKind::kNoFactors ? 0 : held == 11 ? 1 : held / 2; }
};
constexpr ColumnKernel kColumnKernels[] = {{KernelKind::kNoFactors, 11},
                                           {KernelKind::kNoFactors, 19},
                                           {KernelKind::kUnitFactors, 16},
                                           {KernelKind::kReadFactors, 16}};

struct RegisterPlan {
    // Of a row: a power of two up to 32 in a tile; else a warp or a block, of a cluster perhaps.
    int lanes = 0;
    int kernel = 0;               // of kTileKernels, kDirectKernels or kColumnKernels
    int held = 0;                 // numbers that the kernel has room for
    int rounds = 0, longer = 32;  // accesses of a lane in a tile, of 4 bytes; one less from lane `longer` on
    int block_part = 0;           // of a row, for a block of a cluster: accesses of 16 bytes; else classes
    int row_bytes = 0, tile_rows = 0, tile_bytes = 0;  // of a warp's tile; all zeros: rows are read where they lie
    int threads = 0, cluster = 1;                      // of a block, blocks of a row
    KernelKind kind = KernelKind::kNoFactors;          // that the kernel is compiled for
    bool is_column = false;                            // neighbouring threads have neighbouring rows
    bool is_paired = false;  // two rows of 16-bit numbers are four aligned bytes, for every class
    unsigned logits_step = 0, grad_step = 0,
             target_step = 0;       // bytes from a row to the next, or from one of a thread's classes
    int target_bytes = 0;           // of a label, 0 without labels
    int pitch = 0, slot_bytes = 0;  // numbers of a thread in shared memory, bytes of a block
    bool is_ragged = false;         // some rows have numbers beside their whole accesses

    explicit operator bool() const { return lanes > 0; }

    // A bit for each number that a thread holds of a row, and one for what is beside them (register_bits.cuh).
    constexpr int words_of_bits() const { return held == 32 && is_ragged ? 2 : 1; }

    // Of a lane, the first of its accesses, and how many of a row's it has.
    constexpr int begin_of(int lane) const { return lane * rounds - (lane > longer ? lane - longer : 0); }
    constexpr int count_of(int lane, int accesses) const {
        const int own = rounds - (lane >= longer), left = accesses - begin_of(lane);
        return left < 0 ? 0 : left < own ? left : own;
    }
};

// For rows that tiles can hold, none else; with a kernel for such u_j, or one that does for these as well. And how many
// lanes ask the same bank of shared memory at the same time.
RegisterPlan plan_tiles(const RowProblem& p, KernelKind kind, int multiprocessors);
int conflicts_of(const RowProblem& p, const RegisterPlan& plan);

// For longer ones, with clusters of up to so many blocks.
RegisterPlan plan_direct(const RowProblem& p, KernelKind kind, int largest_cluster);

// By which forward leaves bits of a margin loss's rows (RowProblem::bits) and backward finds them: the same for both,
// or none.
RegisterPlan plan_of_bits(const RowProblem& p, int multiprocessors);

// For rows that lie side by side.
RegisterPlan plan_columns(const RowProblem& p, KernelKind kind);

// The same for rows of which so many numbers of a class stay in shared memory: rows in tiles, and rows that lie anyhow.
RegisterPlan plan_kept_tiles(const RowProblem& p, int numbers, int multiprocessors);
RegisterPlan plan_kept_rows(const RowProblem& p, int numbers, int largest_cluster);

// For rows of any length that lie anyhow: threads have a few of their numbers at a time.
RegisterPlan plan_any_rows(const RowProblem& p, int slots);

}  // namespace fused_losses::cuda
