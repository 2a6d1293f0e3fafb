// The host emulation of CUDA launches itself: what it promises kernels, and that it stops those that go wrong. And the
// pieces of the CUDA sources that plan launches: regimes, grids, memory (launch_plans.h) and the walk over a row by
// aligned vectors.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "check.h"
#include "cuda/grid.cuh"
#include "cuda/residence.cuh"
#include "cuda/resident_row.cuh"
#include "guarded.h"
#include "launch_plans.h"
#include "losses/registry.h"

namespace {

using namespace fused_losses;
using namespace fused_losses::cuda;
using namespace fused_losses_test;

constexpr unsigned kAll = 0xffffffffu;

// ---- What kernels may rely on --------------------------------------------------------------------------------------

__global__ void use_warps(int* wrong) {
    const int lane = threadIdx.x % 32;
    const auto expect = [&](bool ok) { *wrong += !ok; };
    expect(__shfl_down_sync(kAll, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane));
    expect(__shfl_down_sync(kAll, lane, 1, 8) == (lane % 8 < 7 ? lane + 1 : lane));
    expect(__shfl_up_sync(kAll, lane, 5) == (lane >= 5 ? lane - 5 : lane));
    expect(__shfl_xor_sync(kAll, 0.5 * lane, 16) == 0.5 * (lane ^ 16));
    expect(__shfl_sync(kAll, lane, 7) == 7);
    expect(__shfl_sync(kAll, lane, 2, 4) == lane / 4 * 4 + 2);
    expect(__ballot_sync(kAll, lane % 2) == 0xaaaaaaaau);
    expect(__any_sync(kAll, lane == 9) && !__all_sync(kAll, lane == 9) && __all_sync(kAll, 1));
    expect(__match_any_sync(kAll, lane / 8) == 0xffu << lane / 8 * 8);
    expect(__reduce_add_sync(kAll, lane) == 496 && __reduce_max_sync(kAll, lane) == 31);
    if (lane < 5) expect(__shfl_sync(0x1fu, 10 * lane, 4) == 40);  // a part of the warp
    __syncwarp();
    int all = 1;
    __match_all_sync(kAll, lane / 8, &all);
    expect(!all);
}

__global__ void use_block(int* wrong, unsigned* total) {
    __shared__ int turned[kBlock];
    const int me = threadIdx.x;
    const int at_first = turned[me];  // the same bytes everywhere
    *wrong += (at_first != -1 && at_first != 0) || dynamic_shared[me].w != unsigned(at_first);
    __syncthreads();
    turned[kBlock - 1 - me] = me;
    dynamic_shared[me].x = me;
    __syncthreads();
    *wrong += turned[me] != kBlock - 1 - me || dynamic_shared[kBlock - 1 - me].x != unsigned(kBlock - 1 - me);
    *wrong += __syncthreads_count(me < 100) != 100 || !__syncthreads_or(me == 3) || __syncthreads_and(me == 3);
    if (me >= 64) return;  // who has finished is not waited for
    atomicAdd(total, 1u);
    __syncthreads();
    *wrong += *total < 64;
}

// Blocks add up numbers, the last one sums them.
__global__ void use_tickets(unsigned* ticket, int* of_block, int* sum) {
    if (threadIdx.x == 17) of_block[blockIdx.x] = 1 + blockIdx.x;
    if (!arrives_last(ticket, gridDim.x) || threadIdx.x != 0) return;
    for (unsigned b = 0; b < gridDim.x; ++b) *sum += __ldcg(of_block + b);
}

// Each block reads what another wrote before the barrier, and has its own shared memory.
__global__ void use_grid(unsigned* arrived, int* of_block, int* wrong) {
    __shared__ int mine;
    if (threadIdx.x == 99) of_block[blockIdx.x] = mine = 7 * blockIdx.x;
    wait_for_grid(arrived);
    const unsigned other = (blockIdx.x + 1) % gridDim.x;
    *wrong += of_block[other] != int(7 * other) || mine != int(7 * blockIdx.x);
}

// Blocks of a cluster copy numbers to shared memory and read those of each other.
__global__ void use_cluster(const uint4* numbers, int* wrong) {
    const int me = threadIdx.x, size = cluster_size();
    __pipeline_memcpy_async(dynamic_shared + me, numbers + kBlock * blockIdx.x + me, sizeof(uint4));
    end_copies();
    sync_cluster();
    for (int rank = 0; rank < size; ++rank) {
        const unsigned block = blockIdx.x / size * size + rank;
        *wrong += of_rank(dynamic_shared[kBlock - 1 - me], rank).y != kBlock * block + kBlock - 1 - me;
    }
    *wrong += cluster_rank() != int(blockIdx.x % size);
    sync_cluster();
}

// Whoever leaves the last barrier out reads from a block that may have finished.
__global__ void leave_cluster(int* wrong) {
    __shared__ int mine;
    mine = threadIdx.x;
    sync_cluster();
    for (int rank = 0; rank < cluster_size(); ++rank) {
        *wrong += of_rank(mine, rank) < 0;
        __syncwarp();
    }
}

void test_clusters() {
    std::vector<uint4> numbers(kBlock * 12);
    for (unsigned i = 0; i < numbers.size(); ++i) numbers[i] = {0, i, 0, 0};
    int wrong = 0;
    for (const int cluster : {1, 2, 4}) {
        const ClusterLaunch launch({kBlock, kBlock * sizeof(uint4), cluster}, 12, nullptr);
        const uint4* const from = numbers.data();
        check(cudaLaunchKernelEx(&launch.config, use_cluster, from, &wrong) == cudaSuccess && wrong == 0,
              "clusters of %d: %d wrong results", cluster, wrong);
    }
}

void test_promises() {
    int wrong = 0;
    for (int run = 0; run < 20; ++run) {
        cuda_emulation::resident = 1 + run % 4;
        const unsigned blocks = 1 + run % 6;
        launch(use_warps, blocks, nullptr, &wrong);
        check(wrong == 0, "functions of warps: %d wrong results", wrong);
        unsigned total = 0;
        cudaLaunchConfig_t config = {};
        config.gridDim = blocks, config.blockDim = kBlock, config.dynamicSmemBytes = kBlock * sizeof(uint4);
        cudaLaunchKernelEx(&config, use_block, &wrong, &total);
        check(wrong == 0 && total == 64 * blocks, "functions of blocks: %d wrong results", wrong);
        unsigned ticket = 0;
        int sum = 0, numbers[6], *of_block = numbers;
        launch(use_tickets, blocks, nullptr, &ticket, of_block, &sum);
        check(sum == int(blocks * (blocks + 1) / 2), "tickets: sum %d of %u blocks", sum, blocks);
        unsigned arrived = 0;
        launch_cooperative(use_grid, 100, nullptr, &arrived, of_block, &wrong);
        check(wrong == 0 && arrived == 6, "grid barrier: %d wrong results, %u blocks", wrong, arrived);
    }
}

// ---- What is stopped -----------------------------------------------------------------------------------------------

__global__ void diverged_shuffle(int*) {
    if (threadIdx.x % 32 != 4) __shfl_down_sync(kAll, 1, 1);
}
__global__ void foreign_lane(int*) { __shfl_sync(threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u, 1, 3); }
__global__ void two_barriers(int*) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void barrier_or_shuffle(int*) {
    if (threadIdx.x < 7)
        __syncthreads();
    else
        __shfl_xor_sync(kAll, 1, 1);
}
__global__ void endless(int* wrong) {
    while (atomicAdd(wrong, 0) == 0) __nanosleep(1);
}

// The launch ends its process with a message that holds `text`.
void expect_death(
    void (*kernel)(int*), const std::string& text,
    void (*run)(void (*)(int*), int*) = [](void (*k)(int*), int* wrong) { launch(k, 2, nullptr, wrong); }) {
    int ends[2];
    if (!check(pipe(ends) == 0, "no pipe")) return;
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        signal(SIGABRT, SIG_DFL);
        int wrong = 0;
        run(kernel, &wrong);
        _exit(0);
    }
    close(ends[1]);
    std::string message;
    char part[4096];
    for (ssize_t size; (size = read(ends[0], part, sizeof part)) > 0;) message.append(part, std::size_t(size));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    check(!WIFEXITED(status) || WEXITSTATUS(status) != 0, "a launch that should die ended well: %s", text.c_str());
    check(message.find(text) != std::string::npos, "not the message '%s': %s", text.c_str(), message.c_str());
}

void launch_clusters(void (*kernel)(int*), int* wrong) {
    const ClusterLaunch launch({kBlock, 0, 4}, 8, nullptr);
    cudaLaunchKernelEx(&launch.config, kernel, wrong);
}

void test_deaths() {
    expect_death(leave_cluster, "has not begun or has finished", launch_clusters);
    expect_death(diverged_shuffle, "no thread can go on");
    expect_death(foreign_lane, "reads from a lane that is not in the mask");
    expect_death(two_barriers, "threads of a block meet at different barriers");
    expect_death(barrier_or_shuffle, "wait in __syncthreads at test_cuda_emulation.cpp");
    expect_death(endless, "wait for ever");
}

// ---- Planning of launches ------------------------------------------------------------------------------------------

// Every class is visited by one thread, once, and vectors are aligned.
template <int kThreads, class Stored>
void test_walk() {
    std::vector<uint4> memory(400);
    constexpr int n = kVector<Stored>;
    for (int shift = 0; shift < n; ++shift) {
        for (const int classes : {1, 2, n - 1, n, n + 1, 2 * n - 1, 2 * n + 3, 100, 101, 333}) {
            const Stored* const row = reinterpret_cast<const Stored*>(memory.data()) + shift;
            for (const bool vectors : {false, true}) {
                std::vector<int> visits(classes + 1);
                int singles = 0;
                bool aligned = true;
                for (int lane = 0; lane < kThreads; ++lane)
                    walk_vectors(row, classes, vectors, lane, kThreads, [&]<int kCount>(Count<kCount>, int c) {
                        for (int k = 0; k < kCount; ++k) ++visits[std::min(c + k, classes)];
                        aligned &= kCount == 1 || misalignment(row + c) == 0;
                        singles += kCount == 1;
                    });
                bool once = visits[classes] == 0;
                for (int c = 0; c < classes; ++c) once &= visits[c] == 1;
                check(once, "%d threads, %d classes, shift %d: not every class once", kThreads, classes, shift);
                check(aligned, "%d threads, %d classes, shift %d: a vector is not aligned", kThreads, classes, shift);
                check(!vectors || singles <= 2 * (n - 1), "%d threads, %d classes, shift %d: %d classes one by one",
                      kThreads, classes, shift, singles);
            }
        }
    }
}

// A gradient that begins elsewhere than its logits: full vectors of it but for a few elements at the ends, and every
// vector of the logits out of two that lie within the row.
template <class Stored>
void test_walk_of_two() {
    constexpr int n = kVector<Stored>, threads = 32;
    std::vector<uint4> memory(200), other(200);  // 333 doubles and an offset
    auto* const bytes = reinterpret_cast<unsigned char*>(other.data());
    for (std::size_t i = 0; i < other.size() * 16; ++i) bytes[i] = (unsigned char)(3 * i % 61);  // finite as numbers
    for (int at = 0; at < n * n; ++at) {
        const Stored* const to = reinterpret_cast<const Stored*>(memory.data()) + at / n;
        const Stored* const from = reinterpret_cast<const Stored*>(other.data()) + at % n;
        for (const int count : {1, n, 2 * n - 1, 2 * n, 3 * n - 1, 3 * n, 4 * n, 5 * n + 1, 100, 333}) {
            std::vector<int> visits(count);
            int singles = 0;
            bool aligned = true, within = true, right = true;
            const auto body = [&]<int kCount>(Count<kCount>, int i) {
                for (int k = 0; k < kCount; ++k) ++visits[i + k];
                singles += kCount == 1;
                if constexpr (kCount > 1) {
                    const int before = misalignment(from + i);
                    aligned &= misalignment(to + i) == 0;
                    within &= before == 0 || (i >= before && i - before + 2 * n <= count);
                    acc_t<Stored> z[kCount], single[1];
                    load_across(from + i, z);
                    for (int k = 0; k < kCount; ++k) load(from + i + k, single), right &= z[k] == single[0];
                }
            };
            for (int lane = 0; lane < threads; ++lane) walk_vectors(to, count, true, lane, threads, body, from);
            check(std::count(visits.begin(), visits.end(), 1) == count, "%d of %d: not every class once", at, count);
            check(aligned && within && right, "%d of %d: aligned %d, within the row %d, right %d", at, count, aligned,
                  within, right);
            check(singles <= (at / n == at % n ? 2 * (n - 1) : 3 * n), "%d of %d: %d singles", at, count, singles);
        }
    }
}

void test_planning() {
    RowProblem p;
    const auto regime = [&](std::int64_t outer, std::int64_t inner, std::int64_t classes, bool pixels) {
        p.outer = outer, p.inner = inner, p.num_classes = classes;
        p.logits_class_stride = pixels ? inner : 1;
        p.logits_stride = {inner * classes, pixels ? 1 : classes};
        return regime_of(p);
    };
    check(regime(1, 100000, 10, false) == Regime::kStaged, "few classes: rows brought to shared memory");
    check(regime(2, 100000, 10, false) == Regime::kThread,
          "few classes in several runs of rows: a thread for each row");
    check(regime(1, 4096, 1000, false) == Regime::kWarp, "1000 classes: a warp for each row");
    check(regime(1, 64, 21841, false) == Regime::kBlock, "21841 classes: a block for each row");
    check(regime(8, 512 * 512, 150, true) == Regime::kThread, "pixels: a thread for each");
    check(regime(2, 1, 150, true) == Regime::kWarp, "one pixel an image: as rows");
    check(regime(1, 7, 150, true) == Regime::kWarp, "fewer pixels than classes: as rows");
    p.dtype = Dtype::kFloat64;
    check(regime(1, 100000, 10, false) == Regime::kWarp, "doubles: no kernels for few classes");
    check(blocks_for(0, 8) == 1 && blocks_for(1, 8) == 1 && blocks_for(8, 8) == 1 && blocks_for(9, 8) == 2,
          "blocks for few rows");
    check(blocks_for(std::int64_t(1) << 40, 8) == kMaxBlocks, "more rows than the largest grid");
    test_walk<8, float>();
    test_walk<8, Half>();
    test_walk<32, double>();
    test_walk<32, float>();
    test_walk<32, Half>();
    test_walk<kBlock, BFloat16>();
    test_walk_of_two<double>();
    test_walk_of_two<float>();
    test_walk_of_two<Half>();
    test_walk_of_two<BFloat16>();
}

}  // namespace

int main() {
    test_promises();
    test_clusters();
    test_deaths();
    test_planning();
    test_row_plans();
    test_choice_of_cluster();
    test_room();
    test_grids();
    test_assumed_denominator();
    test_pixel_plans();
    test_register_plans();
    return report("CUDA emulation");
}
