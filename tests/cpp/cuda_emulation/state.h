// What threads, blocks and a launch are between two turns (scheduler.h), and what is said where none can go on.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <source_location>
#include <string>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;

    constexpr dim3(unsigned size_x = 1, unsigned size_y = 1, unsigned size_z = 1) : x(size_x), y(size_y), z(size_z) {}
};

// As kernels see them.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_emulation {

using Location = std::source_location;

// What tests choose.
inline std::mt19937_64 random{1};
inline unsigned resident = 1;              // blocks that run at the same time
inline unsigned room = ~0u;                // blocks that the stream has a place for, which no kernel is told
inline unsigned largest_grid = ~0u;        // a launch that asks for more blocks gets these: for loops over the grid
inline constexpr int kYieldOneIn = 2;      // how often an atomic function lets others go first
inline constexpr int kLongestStay = 14;    // another block takes over after 2^0 to 2^13 turns of threads
inline constexpr int kReorderOneIn = 256;  // how often a warp or a thread is given another priority
inline constexpr long kEndlessNaps = 100'000;

inline bool one_in(unsigned n) { return random() % n == 0; }

enum class State : std::uint8_t { kReady, kAtBarrier, kInWarp, kAtCluster, kFinished };

// An asynchronous copy that has not been done yet; what was at its source when it began.
struct Copy {
    void* to;
    std::vector<unsigned char> bytes;
};

using Place = void* [5];  // what __builtin_setjmp fills

struct Thread {
    ucontext_t context;  // where it begins
    Place place;         // where it goes on
    bool begun = false;
    bool has_waited = false;  // for the launch before
    uint3 index;
    int number;
    State state;
    // Where and for whom it waits, what it brings, and what all lanes of the mask brought
    const char* function;
    Location where;
    unsigned mask;
    std::uint64_t brought, received[32];
    std::uint64_t sync = 0;  // its last __syncwarp, a number of all that took part
    std::vector<Copy> copies;
};

// Who runs first: whoever comes; warps, or threads, by their priority, so that some run far ahead of others.
enum class Order { kAny, kByWarp, kByThread };

struct Block {
    uint3 index;
    Order order;
    int lowest_priority = 0;
    int any = 0;                              // of __syncthreads_or
    unsigned running = 0;                     // threads that have not finished
    unsigned at_barrier = 0, at_cluster = 0;  // those of them that wait for all of the block, of the cluster
    std::uint64_t period = 0;                 // since its last barrier
    bool has_waited = false;                  // one of its threads, for the launch before
    std::vector<Thread> threads;
    // Side by side, as a turn reads those of all threads that are ready
    std::vector<int> priority;
    std::vector<int> ready;             // numbers of threads
    std::vector<unsigned char> shared;  // contents while another block runs
};

inline Place scheduler;
inline Thread* current = nullptr;
inline Block* current_block = nullptr;
inline std::vector<Block> blocks;  // those that run at the same time
inline unsigned cluster_size = 1;  // consecutive blocks
inline std::function<void()> kernel;
inline std::uint64_t periods = 0;  // between barriers, so far: each gets a number of its own
inline long naps = 0;              // since something else happened
inline long stay = 0;              // turns until another block takes over
inline bool overlaps = false;      // the launch may begin before the one before it has ended
inline bool has_failed = false;    // an assertion of the kernel: its other threads go no further

// Runs a launch: a library that Python loads has a thread for all of them.
inline void (*run_launch)(const std::function<void()>&) = [](const std::function<void()>& launch) { launch(); };

// ---- Messages ------------------------------------------------------------------------------------------------------

inline std::string describe(const Thread& thread) {
    if (thread.state == State::kFinished) return "have finished";
    if (thread.state == State::kReady) return "are ready to run";
    const std::string file = thread.where.file_name();
    std::string text = std::string("wait in ") + thread.function + " at " + file.substr(file.rfind('/') + 1) + ":" +
                       std::to_string(thread.where.line());
    char mask[32];
    std::snprintf(mask, sizeof mask, ", mask 0x%08x", thread.mask);
    return thread.state == State::kInWarp ? text + mask : text;
}

[[noreturn]] inline void die(const std::string& what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what.c_str());
    if (current_block) {
        std::fprintf(stderr, "block %u of %u:\n", current_block->index.x, gridDim.x);
        std::map<std::string, std::vector<int>> groups;
        for (const Thread& thread : current_block->threads) groups[describe(thread)].push_back(thread.number);
        for (const auto& [text, members] : groups)
            std::fprintf(stderr, "  %zu threads %s, first %d, last %d\n", members.size(), text.c_str(), members.front(),
                         members.back());
    }
    std::abort();
}

}  // namespace cuda_emulation
