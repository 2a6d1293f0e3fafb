// What runs compiled kernels on the host (cuda_compiled/): the instructions by hand-worked numbers, and memory as other
// blocks see it.
#include <cmath>
#include <limits>

#include "check.h"
#include "cuda_compiled/instructions.h"
#include "deaths.h"

namespace {

using namespace cuda_emulation;
using namespace fused_losses_test;

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

void test_integers() {
    check(shl_of<u32>(3, 31) == 0x80000000u && shl_of<u32>(3, 32) == 0 && shl_of<u64>(1, 40) == 1ull << 40, "shl");
    check(shr_of<s32>(-8, 1) == -4 && shr_of<s32>(-8, 40) == -1 && shr_of<u32>(0x80000000u, 33) == 0, "shr");
    check(div_of<s32>(-7, 2) == -3 && rem_of<s32>(-7, 2) == -1 && rem_of<u64>(7, 4) == 3, "division");
    const s32 least = std::numeric_limits<s32>::min();
    check(div_of<s32>(least, -1) == least && rem_of<s32>(least, -1) == 0 && rem_of<u32>(7, 0) == 7, "no quotient");
    check(insert_bits<u32>(0x5, 0xffffffff, 8, 4) == 0xfffff5ff && insert_bits<u64>(7, 0, 32, 32) == 7ull << 32, "bfi");
    check(permute(0x33221100, 0x77665544, 0x7632) == 0x77663322 && permute(0x80, 0, 0x0008) == 0x808080ff, "prmt");
    check(as<u16>(u32(0x12345678)) == 0x5678 && as<s64>(s32(-1)) == -1 && as<float>(0x40490fdbu) > 3.14f, "registers");
}

void test_floats() {
    check(std::signbit(min_of_floats(0.0f, -0.0f)) && !std::signbit(max_of_floats(-0.0f, 0.0f)), "zeros");
    check(max_of_floats(kNan, 2.0f) == 2 && min_of_floats(2.0f, kNan) == 2, "a NaN that is left out");
    check(std::isnan(max_or_nan(kNan, 2)) && std::isnan(max_or_nan(2, kNan)) && max_or_nan(1, 2) == 2, "max.NaN");
    check(saturated(kNan) == 0 && saturated(-1) == 0 && saturated(0.5f) == 0.5f && saturated(7) == 1, "cvt.sat");
    const float tiny = 0x1p-30f, below_one = 1 - 0x1p-24f;
    check(fma_down(1, 1, tiny) == 1 && fma_down(1, 1, -tiny) == below_one && fma_down(-1, 1, -tiny) < -1, "fma.rm");
    check(add_to_zero(1, -tiny) == below_one && add_to_zero(-1, tiny) == -below_one && add_to_zero(1, tiny) == 1, "rz");
    check(std::isinf(fma_down(kInfinity, 1, 1)) && std::fabs(coarse_rcp(3) * 3 - 1) < 1e-5, "ends");
    check(integer_of<s32>(kNan) == 0 && integer_of<s32>(3e9f) == 2147483647 && integer_of<s32>(-7.0f) == -7, "cvt.rzi");
}

void test_halves() {
    check(narrowed<bf16>(1 + 0x1p-8f) == 0x3f80 && narrowed<bf16>(1 + 0x1.8p-7f) == 0x3f82, "ties go to even numbers");
    check(narrowed<f16>(65520) == 0x7c00 && narrowed<f16>(0x1p-24f) == 1 && widened<f16>(0x3c01) == 1 + 0x1p-10f,
          "f16");
    check(pair_of<bf16>(2, 1) == 0x40003f80, "the first is the upper one");
    check(max_of_pairs<bf16>(0x7fff3f80, 0x40004000) == 0x40004000, "pairs, one with a NaN");
}

// Runs blocks of 32 threads, two at a time.
void run(unsigned blocks, const std::function<void()>& body) {
    resident = 2;
    overlaps = false;
    launch(blocks, 32, 1, false, body);
}

// How often, of 200 launches, the last of two blocks misses what the other has stored.
int count_missed(bool with_fence, bool bypasses) {
    int missed = 0;
    for (int n = 0; n < 200; ++n) {
        alignas(8) u32 stored[2] = {0, 0}, ticket = 0, sum = 0;
        const auto at = [&](unsigned block) { return reinterpret_cast<u64>(&stored[block]); };
        const auto load = [&](unsigned block) {
            return load_global<u32, 1>(at(block), bypasses ? kBypass : kUsual)[0];
        };
        run(2, [&] {
            if (threadIdx.x != 0) return;
            load(1 - blockIdx.x);  // may stay in the cache
            store_global<u32, 1>(at(blockIdx.x), {1});
            if (with_fence) device_fence();
            if (atomicAdd(atomic_place(reinterpret_cast<u64>(&ticket)), 1u) == 0) return;
            if (with_fence) device_fence();
            sum = load(0) + load(1);
        });
        missed += sum != 2;
        check(stored[0] == 1 && stored[1] == 1, "a launch that has ended has stored");
    }
    return missed;
}

void test_device_memory() {
    check(count_missed(true, false) == 0, "what fences order");
    check(count_missed(false, true) > 0, "a store without a fence");
    check(count_missed(false, false) > count_missed(false, true) / 2, "nor by an old line of the cache");
    // A fence is for what the block has told the thread, too: one thread's, after a barrier.
    alignas(8) u32 of_lanes[32] = {}, ticket = 0, wrong = 0;
    run(2, [&] {
        if (blockIdx.x == 0) {
            store_global<u32, 1>(reinterpret_cast<u64>(&of_lanes[threadIdx.x]), {1});
            __syncthreads();
            if (threadIdx.x != 0) return;
            device_fence();
            atomicAdd(atomic_place(reinterpret_cast<u64>(&ticket)), 1u);
        } else if (threadIdx.x == 0) {
            while (atomicAdd(&ticket, 0u) == 0) __nanosleep(1);
            device_fence();
            for (const u32& one : of_lanes) wrong += load_global<u32, 1>(reinterpret_cast<u64>(&one), kUsual)[0] != 1;
        }
    });
    check(wrong == 0, "what a barrier has told");
}

void test_deaths() {
    alignas(16) static unsigned char bytes[32];
    const u64 odd = reinterpret_cast<u64>(bytes) + 4;
    expect_death("not aligned", [&] { run(1, [&] { load_global<u32, 4>(odd, kUsual); }); });
    expect_death("no address in shared", [] { run(1, [] { load_shared<u32, 1>(kSharedSize); }); });
    expect_death("stores before it has waited", [&] {
        overlaps = true;
        launch(1, 32, 1, false, [&] { store_global<u32, 1>(odd, {1}); });
    });
    expect_death("a kernel that was not compiled", [] { compiled_kernel(nullptr); });
}

}  // namespace

int main() {
    test_integers();
    test_floats();
    test_halves();
    test_device_memory();
    test_deaths();
    return report("compiled CUDA kernels");
}
