// The host emulation of CUDA launches itself: what it promises kernels, and that it stops those that go wrong. And the
// pieces of the CUDA sources that plan launches: grids and the sharing out of rows (launch_plans.h).
#include <string>

#include "check.h"
#include "cuda/cluster.cuh"
#include "cuda/grid.cuh"
#include "cuda/warp_tiles.cuh"
#include "deaths.h"
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
    expect(__shfl_xor_sync(kAll, 0.5 * lane, 16) == 0.5 * (lane ^ 16));
    expect(__shfl_sync(kAll, lane, 7) == 7);
    expect(__shfl_sync(kAll, lane, 2, 4) == lane / 4 * 4 + 2);
    if (lane < 5) expect(__shfl_sync(0x1fu, 10 * lane, 4) == 40);  // a part of the warp
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
    grid_group{arrived}.sync();
    const unsigned other = (blockIdx.x + 1) % gridDim.x;
    *wrong += of_block[other] != int(7 * other) || mine != int(7 * blockIdx.x);
}

// Blocks of a cluster copy numbers to shared memory and read those of each other.
__global__ void use_cluster(const uint4* numbers, int* wrong) {
    const int me = threadIdx.x, size = cluster_group::num_blocks();
    __pipeline_memcpy_async(dynamic_shared + me, numbers + kBlock * blockIdx.x + me, sizeof(uint4));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    cluster_group::sync();
    for (int rank = 0; rank < size; ++rank) {
        const unsigned block = blockIdx.x / size * size + rank;
        *wrong += cluster_group::map_shared_rank(&dynamic_shared[kBlock - 1 - me], rank)->y !=
                  kBlock * block + kBlock - 1 - me;
    }
    *wrong += cluster_group::block_rank() != int(blockIdx.x % size);
    cluster_group::sync();
}

// Whoever leaves the last barrier out reads from a block that may have finished.
__global__ void leave_cluster(int* wrong) {
    __shared__ int mine;
    if (threadIdx.x == 0) mine = 1;
    cluster_group::sync();
    for (int rank = 0; rank < cluster_group::num_blocks(); ++rank) {
        *wrong += *cluster_group::map_shared_rank(&mine, rank) < 0;
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
        for (int again = 0; again < 3; ++again) launch_cooperative(use_grid, 100, nullptr, &arrived, of_block, &wrong);
        check(wrong == 0 && arrived == 1u << 31, "grid barrier: %d wrong results, counter %u", wrong, arrived);
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

void expect_death(
    void (*kernel)(int*), const std::string& text,
    void (*run)(void (*)(int*), int*) = [](void (*k)(int*), int* wrong) { launch(k, 2, nullptr, wrong); }) {
    int wrong = 0;
    fused_losses_test::expect_death(text, [&] { run(kernel, &wrong); });
}

void launch_clusters(void (*kernel)(int*), int* wrong) {
    const ClusterLaunch launch({kBlock, 0, 4}, 8, nullptr);
    cudaLaunchKernelEx(&launch.config, kernel, wrong);
}

void launch_early(void (*kernel)(int*), int* wrong) {
    const ClusterLaunch launch({kBlock, 0, 1, true}, 8, nullptr);
    cudaLaunchKernelEx(&launch.config, kernel, wrong);
}
__global__ void in_no_hurry(int*) {}
__global__ void waits_in_one_block(int*) {
    if (blockIdx.x == 3) wait_for_kernel_before();
}

void test_deaths() {
    expect_death(in_no_hurry, "has not waited", launch_early);
    expect_death(waits_in_one_block, "has not waited", launch_early);
    expect_death(leave_cluster, "has not begun or has finished", launch_clusters);
    expect_death(diverged_shuffle, "no thread can go on");
    expect_death(foreign_lane, "reads from a lane that is not in the mask");
    expect_death(two_barriers, "threads of a block meet at different barriers");
    expect_death(barrier_or_shuffle, "wait in __syncthreads at test_cuda_emulation.cpp");
    expect_death(endless, "wait for ever");
}

// ---- Races (races.h) -----------------------------------------------------------------------------------------------

#ifdef __SANITIZE_THREAD__
// Shuffles do not say that memory has been read or written.
__device__ int through_memory(int mine, bool with_barrier, int distance) {
    __shared__ int numbers[kBlock];
    numbers[threadIdx.x] = mine;
    if (with_barrier) __syncwarp();
    __shfl_xor_sync(kAll, mine, 1);
    return numbers[threadIdx.x ^ distance];
}
__global__ void read_too_early(int* wrong) { *wrong += through_memory(threadIdx.x, false, 1) < 0; }
__global__ void read_of_another_warp(int* wrong) { *wrong += through_memory(threadIdx.x, true, 32) < 0; }
__global__ void overwrite_too_early(int* wrong) {
    __shared__ int first;
    if (threadIdx.x == 0) first = 1;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const int x = __shfl_xor_sync(kAll, int(first), 1);
    if (threadIdx.x == 0) first = x + 1;
    *wrong += x != 1;
}

void test_races() {
    expect_death(read_too_early, "wrote what is read");
    expect_death(read_of_another_warp, "wrote what is read");
    expect_death(overwrite_too_early, "read what is overwritten");
}
#else
void test_races() {}  // nobody watches in the other build
#endif

// ---- Formulas
// --------------------------------------------------------------------------------------------------------

double ulps(float got, double want) { return std::fabs(got - want) / std::ldexp(1.0, std::ilogb(want) - 23); }

// What math.h promises of the device, where instructions are as inexact as they may be.
void test_formulas() {
    Random random(1);
    double log = 0, power = 0;
    cuda_emulation::is_inexact = true;
    for (int i = 0; i < 400000; ++i) {
        const float miss =
            float(random.one_in(2) ? random.uniform(-1, 3) : std::ldexp(random.uniform(-1, 1), -random.below(40)));
        const float x = float(1 + double(miss)),
                    large = float(std::ldexp(random.uniform(1, 2), random.below(200) - 100));
        const double exact = std::fabs(miss) < 0.4f ? std::log1p(double(miss)) : std::log(double(x));
        if (x > 0 && exact != 0) log = std::fmax(log, ulps(math::log_near_one(x, miss), exact));
        log = std::fmax(log, ulps(math::log_near_one(large, large - 1), std::log(double(large))));
        const float y = float(random.uniform(-0.5, 0.5) * (1 + random.below(20)));
        const double of = std::pow(double(x), double(y)),
                     bound = 4 + 4 * std::fabs(y) * (1 + std::fabs(std::log(double(x))));
        if (of > 1e-30 && of < 1e30) power = std::fmax(power, ulps(math::coarse_pow(x, y), of) / bound);
    }
    cuda_emulation::is_inexact = false;
    std::printf("log %.2f ulp, power %.2f of its bound\n", log, power);
    check(log < 10 && power < 1, "log_near_one off by %.2f ulp, coarse_pow by %.2f of its bound", log, power);
    check(math::log_near_one(0.0f, -1.0f) == -std::numeric_limits<float>::infinity(), "log of 0");
}

// ---- Planning of launches ------------------------------------------------------------------------------------------

void test_planning() {
    check(blocks_for(0, 8) == 1 && blocks_for(1, 8) == 1 && blocks_for(8, 8) == 1 && blocks_for(9, 8) == 2,
          "blocks for few rows");
    check(blocks_for(std::int64_t(1) << 40, 8) == kMaxBlocks, "more rows than the largest grid");
}

}  // namespace

int main() {
    test_promises();
    test_formulas();
    test_clusters();
    test_deaths();
    test_races();
    test_planning();
    test_grids();
    test_assumed_denominator();
    test_register_plans();
    test_plans_of_bits();
    test_kept_plans();
    test_column_plans();
    return report("CUDA emulation");
}
