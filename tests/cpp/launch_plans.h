// Tests of how launches use shared memory and clusters (cuda/residence.h), for devices described by numbers.
#pragma once

#include "check.h"
#include "cuda/register_plan.h"
#include "cuda/residence.cuh"

namespace fused_losses_test {

using namespace fused_losses;
using namespace fused_losses::cuda;

// An A100, or an H100 that can launch clusters of so many blocks, each within a part of the device; a kernel of 64
// registers and 4 KiB of static shared memory.
inline Room room_of(int largest_cluster) {
    if (largest_cluster == 1) return {108, 4, 163 * 1024 - 4096, 164 * 1024, 5120};
    Room room{132, 4, 227 * 1024 - 4096, 228 * 1024, 5120};
    for (int s = 0; 2 << s <= largest_cluster; ++s)
        for (int blocks = 1; blocks <= kEnoughBlocks; ++blocks)
            for (const int part : {16, 16, 16, 16, 16, 16, 18, 18})
                room.clusters[s][blocks - 1] += part * blocks >> (s + 1);
    return room;
}

// The parts of the blocks of a cluster cover a row from any alignment on, and fit into their buffers.
inline void test_row_plan(const Room& room, std::int64_t classes, int element, int groups, int blocks, int buffers,
                          int cluster) {
    const RowPlan plan = plan_rows(room, classes, element, groups);
    const auto& held = plan.residence;
    check(plan.cluster == cluster && held.buffers == buffers && room.blocks_with(plan.bytes) >= blocks,
          "%lld classes: cluster %d, %d buffers, %d blocks", (long long)classes, plan.cluster, held.buffers,
          room.blocks_with(plan.bytes));
    if (plan.bytes == 0) return;
    const int vector = 16 / element;
    check(plan.bytes == std::int64_t(held.buffers) * held.capacity * element * groups && plan.bytes <= room.per_block,
          "%lld classes: %lld bytes", (long long)classes, (long long)plan.bytes);
    check(held.capacity % vector == 0 && std::int64_t(held.capacity) * cluster >= classes + vector - 1,
          "%lld classes: %d in a buffer", (long long)classes, held.capacity);
}

// The larger cluster only where the device then runs more blocks at the same time.
inline void test_choice_of_cluster() {
    Room room = room_of(16);
    room.clusters[3][1] = room.clusters[2][0] / 2;  // 16 blocks, two on a multiprocessor: as many as of 8 blocks
    test_row_plan(room, 400000, 4, 1, 1, 1, 8);
    room.clusters[2][0] = 0;  // none of 8
    test_row_plan(room, 400000, 4, 1, 2, 1, 16);
    room.clusters[3][1] = 0;
    test_row_plan(room, 400000, 4, 1, 0, 0, 1);
}

__global__ void idle(RowArgs<float>) {}

// A kernel's first launch asks what there is, the others do not.
inline void test_room() {
    using namespace cuda_emulation;
    for (const unsigned largest : {1u, 4u, 8u, 16u}) {
        largest_cluster = largest, multiprocessors = 16;
        ++device;
        Room room;
        check(find_room(idle, room) == cudaSuccess && room.multiprocessors == 16, "no room");
        for (int s = 0; s < 4; ++s)
            check((room.clusters[s][0] > 0) == (2u << s <= largest), "clusters of %d: %d", 2 << s, room.clusters[s][0]);
        const long before = questions;
        check(find_room(idle, room) == cudaSuccess && questions == before, "asked %ld times", questions - before);
    }
}

// Rows are looped over by as many blocks as the device runs, and nobody asks twice how many these are.
__global__ inline void count_blocks(unsigned* blocks) {
    if (threadIdx.x == 0) atomicMax(blocks, gridDim.x);
}

inline void test_grids() {
    using namespace cuda_emulation;
    multiprocessors = 4;
    for (const int at_once : {2, 5}) {
        blocks_per_multiprocessor = at_once;
        ++device;
        const long before = questions;
        for (const std::int64_t rows : {0, 1, 8, 9, 100000}) {
            unsigned blocks = 0;
            const std::int64_t wanted = std::max<std::int64_t>(1, (rows + 7) / 8);
            check(launch_over_rows(count_blocks, rows, 8, nullptr, &blocks) == cudaSuccess, "not launched");
            check(blocks == std::min<std::int64_t>(wanted, 4 * at_once), "%u blocks for %lld rows", blocks,
                  (long long)rows);
        }
        check(questions - before == 2, "asked %ld times", questions - before);
    }
    blocks_per_multiprocessor = 2;
}

// A gradient is written with the number of rows for its denominator where that moves fewer bytes on average.
inline void test_assumed_denominator() {
    const std::int64_t target[1] = {};
    const float weight[1] = {};
    RowProblem p;
    const auto assumed = [&](std::int64_t rows, std::int64_t classes) {
        p.inner = rows, p.num_classes = classes;
        return assumed_denominator(p);
    };
    p.target = target;
    p.dtype = Dtype::kBFloat16;
    check(assumed(4096, 1000) == 4096, "8 MB of logits: a launch takes longer");
    check(assumed(8192, 128256) == 0, "2 GB of logits: counted first");
    check(assumed(30000, 1000) == 0, "60 MB of logits: counted first");
    check(assumed(1 << 24, 10) == 1 << 24, "10 classes: the targets are as large as half of the logits");
    p.sample_weight = weight;
    check(assumed(4096, 1000) == 0, "weights: the sum is not the number of rows");
    p.sample_weight = nullptr, p.class_weight = weight;
    check(assumed(4096, 1000) == 0, "class weights: the sum is not the number of rows");
    p.class_weight = nullptr, p.target = nullptr;
    check(assumed(8192, 128256) == 8192, "probability targets: no row is ignored");
    p.reduction = Reduction::kSum;
    check(assumed(4096, 1000) == 0, "sums have no denominator");
}

inline void test_row_plans() {
    const Room h100 = room_of(16), portable = room_of(8), a100 = room_of(1);
    test_row_plan(h100, 1000, 2, 8, 3, 2, 1);
    test_row_plan(h100, 1000, 4, 8, 3, 2, 1);
    test_row_plan(h100, 2049, 4, 1, 4, 2, 1);
    test_row_plan(h100, 10000, 2, 1, 3, 2, 1);
    test_row_plan(h100, 21841, 2, 1, 3, 1, 1);
    test_row_plan(h100, 50257, 2, 1, 3, 1, 2);
    test_row_plan(h100, 128256, 2, 1, 3, 1, 4);
    test_row_plan(h100, 128256, 4, 1, 3, 1, 8);
    test_row_plan(h100, 400000, 4, 1, 2, 1, 16);
    test_row_plan(h100, 800000, 4, 1, 1, 1, 16);
    test_row_plan(h100, 1000000, 4, 1, 0, 0, 1);  // too large for 16 blocks
    test_row_plan(portable, 400000, 4, 1, 1, 1, 8);
    test_row_plan(portable, 800000, 4, 1, 0, 0, 1);
    test_row_plan(a100, 21841, 2, 1, 3, 1, 1);
    test_row_plan(a100, 50257, 2, 1, 1, 1, 1);
    test_row_plan(a100, 128256, 2, 1, 0, 0, 1);
    for (int classes = 1; classes < 3000; classes += 17)
        for (const int element : {2, 4, 8}) test_row_plan(h100, classes, element, 1, 4, 2, 1);
}

// A tile's classes do not overlap, end within its memory, and are as misaligned there as in the image.
inline void test_pixel_plan(const Room& room, std::int64_t classes, std::int64_t inner, int element, int pixels,
                            int blocks) {
    RowProblem p;
    p.outer = 2, p.inner = inner, p.num_classes = classes;
    p.logits_class_stride = inner, p.logits_stride = {inner * classes, 1};
    const RowPlan plan = plan_pixels(room, p, element);
    const auto& held = plan.residence;
    check(held.pixels == pixels && room.blocks_with(plan.bytes) >= blocks,
          "%lld classes, %lld pixels: %d at a time, %d "
          "blocks",
          (long long)classes, (long long)inner, held.pixels, room.blocks_with(plan.bytes));
    if (plan.bytes == 0) return;
    const int vector = 16 / element;
    check(held.pitch >= held.pixels && (inner - held.pitch) % vector == 0, "pitch %d for %d of %lld pixels", held.pitch,
          held.pixels, (long long)inner);
    check(
        (vector - 1 + (classes - 1) * held.pitch + held.pixels) * element <= plan.bytes && plan.bytes <= room.per_block,
        "%lld bytes for %lld classes", (long long)plan.bytes, (long long)classes);
}

inline void test_pixel_plans() {
    const Room h100 = room_of(16), a100 = room_of(1);
    test_pixel_plan(h100, 19, 512 * 1024, 4, 256, 3);
    test_pixel_plan(h100, 150, 512 * 512, 2, 128, 3);
    test_pixel_plan(h100, 150, 512 * 512, 4, 64, 3);
    test_pixel_plan(h100, 150, 511 * 511, 2, 128, 3);
    test_pixel_plan(a100, 150, 512 * 512, 2, 128, 3);
    test_pixel_plan(h100, 150, 49, 2, 64, 3);
    test_pixel_plan(h100, 1000, 512 * 512, 4, 32, 1);
    test_pixel_plan(h100, 5000, 512 * 512, 4, 0, 0);
    for (const int element : {2, 4, 8})
        for (int inner = 16; inner < 80; ++inner)
            test_pixel_plan(h100, 20, inner, element, inner > 64 ? 128 : inner > 32 ? 64 : 32, 3);
}

// Every number of a row is held by one lane, as often as there is room for; tiles end within their memory.
inline void test_register_plan(Dtype dtype, Spread spread, std::int64_t classes, std::int64_t rows, std::int64_t base) {
    const int element = bytes_of(dtype), per_word = 4 / element, per_access = 16 / element;
    RowProblem p;
    p.dtype = dtype, p.spread = spread, p.inner = rows, p.num_classes = classes;
    p.logits_stride = p.grad_stride = {rows * classes, classes};
    p.logits = p.grad = reinterpret_cast<void*>(base);
    const auto complain = [&](const RegisterPlan& plan, const char* what) {
        check(false, "%lld classes of %d bytes: %s: %d lanes of %d, %d rounds, share %d, %d blocks", (long long)classes,
              element, what, plan.lanes, plan.held, plan.rounds, plan.share, plan.cluster);
    };
    if (const RegisterPlan plan = plan_tiles(p, 132)) {
        const std::int64_t words = classes / per_word;
        if (plan.rounds * plan.lanes < words || plan.rounds * per_word > plan.held) complain(plan, "no room");
        if (plan.tile_bytes < plan.tile_rows * classes * element + base % 16 || plan.tile_bytes % 16 != 0 ||
            plan.tile_rows % (32 / plan.lanes) != 0)
            complain(plan, "tile");
    } else if (classes <= 200 && (classes % per_word != 0 || base % 4 == 0)) {
        complain(plan, "no tiles");
    }
    for (const int largest : {1, 4, 16}) {
        const RegisterPlan plan = plan_direct(p, largest);
        const std::int64_t accesses = classes / per_access, most = std::int64_t(plan.lanes) * (plan.held / per_access);
        if (!plan) {
            if (classes > 32 && classes <= 10 * 1024) complain(plan, "not direct");
            continue;
        }
        if (plan.share * plan.cluster < accesses || plan.share > most || plan.cluster > largest)
            complain(plan, "no room");
        if (plan.lanes % 32 != 0 || plan.threads % plan.lanes != 0 || plan.threads > kMostThreads)
            complain(plan, "threads");
        if (!plan.is_ragged && (classes % per_access != 0 || base % 16 != 0)) complain(plan, "not ragged");
    }
}

inline void test_register_plans() {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        for (const Spread spread : {Spread::kNone, Spread::kOnes})
            for (const int base : {0, bytes_of(dtype), 8})
                for (int classes = 1; classes < 200000; classes += 1 + classes / 7)
                    for (const int rows : {1, 1000, 1000000}) test_register_plan(dtype, spread, classes, rows, base);
    RowProblem p;
    p.dtype = Dtype::kFloat32, p.inner = 1000, p.num_classes = 100, p.logits_stride = p.grad_stride = {0, 100};
    check(bool(plan_tiles(p, 132)), "100 classes: no tiles");
    p.grad = reinterpret_cast<void*>(4);
    check(!plan_tiles(p, 132) && !plan_direct(p, 16), "a gradient that begins elsewhere within 16 bytes");
    p.grad = nullptr;
    p.logits_stride.inner = 104;
    check(!plan_tiles(p, 132) && plan_direct(p, 16), "rows with gaps: one by one");
    p.logits_class_stride = 2;
    check(!plan_direct(p, 16), "every other class");
    p.logits_class_stride = 1, p.dtype = Dtype::kFloat64;
    check(!plan_direct(p, 16), "doubles");
}

}  // namespace fused_losses_test
