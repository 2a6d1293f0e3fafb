// Tests of how rows are shared out (cuda/register_plan.h) and of the grids that work on them.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "check.h"
#include "cuda/register_launch.cuh"
#include "cuda/register_plan.h"
#include "cuda/row_part.cuh"

namespace fused_losses_test {

using namespace fused_losses;
using namespace fused_losses::cuda;

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

// Every number of a row is held by one lane, as often as there is room for; tiles end within their memory.
inline void test_register_plan(Dtype dtype, KernelKind kind, std::int64_t classes, std::int64_t rows,
                               std::int64_t base) {
    const int element = bytes_of(dtype), per_word = 4 / element, per_access = 16 / element;
    RowProblem p;
    p.dtype = dtype, p.inner = rows, p.num_classes = classes;
    p.logits_stride = p.grad_stride = {rows * classes, classes};
    p.logits = p.grad = reinterpret_cast<void*>(base);
    const auto complain = [&](const RegisterPlan& plan, const char* what) {
        check(false, "%lld classes of %d bytes: %s: %d lanes of %d, %d rounds, %d of each of %d blocks",
              (long long)classes, element, what, plan.lanes, plan.held, plan.rounds, plan.block_part, plan.cluster);
    };
    if (const RegisterPlan plan = plan_tiles(p, kind, 132)) {
        const std::int64_t words = classes / per_word;
        const int always = kTileKernels[plan.kernel].always(plan.held / per_word);
        std::int64_t shared_out = 0;
        for (int lane = 0; lane < plan.lanes; ++lane) {
            const int count = plan.count_of(lane, static_cast<int>(words));
            if (count < always) complain(plan, "a lane with too little");
            if (count > 0 && plan.begin_of(lane) != shared_out) complain(plan, "a gap");
            shared_out += count;
        }
        if (classes > 3 && plan.kind != kind) complain(plan, "a kernel of another kind");
        if (shared_out != words || plan.rounds * per_word > plan.held) complain(plan, "no room");
        if (plan.tile_bytes < plan.tile_rows * classes * element + base % 16 || plan.tile_bytes % 16 != 0 ||
            plan.tile_rows % (32 / plan.lanes) != 0)
            complain(plan, "tile");
    } else if (classes <= 200 && (classes >= per_word || !is_multi_reduction(kind)) &&
               (classes % per_word != 0 || base % 4 == 0)) {
        complain(plan, "no tiles");
    }
    for (const int largest : {1, 4, 16}) {
        const RegisterPlan plan = plan_direct(p, kind, largest);
        const std::int64_t accesses = classes / per_access, most = std::int64_t(plan.lanes) * (plan.held / per_access);
        if (!plan) {
            const int fewest = is_multi_reduction(kind) ? 300 : 32;  // below that, rows are in tiles
            if (classes > fewest && classes <= 8 * 1024) complain(plan, "not direct");
            continue;
        }
        if (plan.block_part * plan.cluster < accesses || plan.block_part > most || plan.cluster > largest)
            complain(plan, "no room");
        const std::int64_t of_last = (classes - per_access + 1) / per_access - plan.block_part * (plan.cluster - 1);
        if (of_last < plan.lanes * kDirectKernels[plan.kernel].always(plan.held / per_access))
            complain(plan, "a thread with too little");
        if (plan.lanes % 32 != 0 || plan.threads % plan.lanes != 0 || plan.threads > kMostThreads)
            complain(plan, "threads");
        if (!plan.is_ragged && (classes % per_access != 0 || base % 16 != 0)) complain(plan, "not ragged");
    }
}

inline void test_register_plans() {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        for (const KernelKind kind :
             {KernelKind::kNoFactors, KernelKind::kUnitFactors, KernelKind::kOneKept, KernelKind::kTwoKept})
            for (const int base : {0, bytes_of(dtype), 8})
                for (int classes = 1; classes < 200000; classes += 1 + classes / 7)
                    for (const int rows : {1, 1000, 1000000}) test_register_plan(dtype, kind, classes, rows, base);
    RowProblem p;
    p.dtype = Dtype::kFloat32, p.inner = 1000, p.num_classes = 100, p.logits_stride = p.grad_stride = {0, 100};
    check(bool(plan_tiles(p, kind_of(p), 132)), "100 classes: no tiles");
    p.grad = reinterpret_cast<void*>(4);
    check(!plan_tiles(p, kind_of(p), 132) && !plan_direct(p, kind_of(p), 16),
          "a gradient that begins elsewhere within 16 bytes");
    p.grad = nullptr;
    p.logits_stride.inner = 104;
    check(!plan_tiles(p, kind_of(p), 132) && plan_direct(p, kind_of(p), 16), "rows with gaps: one by one");
    p.logits_class_stride = 2;
    check(!plan_direct(p, kind_of(p), 16), "every other class");
    p.logits_class_stride = 1, p.dtype = Dtype::kFloat64;
    check(!plan_direct(p, kind_of(p), 16), "doubles");
}

// Backward's logits may be a copy of forward's, where they are a tensor of their own. Bits are then shared out as they
// were; of a part of a larger tensor there are none.
inline void test_plans_of_bits() {
    alignas(16) static char memory[64];
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        for (const std::int64_t classes : {33, 70, 101, 300, 1000, 1001, 4000}) {
            RowProblem p;
            p.dtype = dtype, p.num_classes = classes, p.inner = 8;
            p.logits = memory, p.logits_stride.inner = p.grad_stride.inner = classes;
            const auto where = [](const RegisterPlan& plan) {
                return std::array{plan.kernel, plan.lanes,      plan.held,           plan.rounds,
                                  plan.longer, plan.block_part, int(plan.is_ragged), plan.words_of_bits()};
            };
            const RegisterPlan forward = plan_of_bits(p, 132);
            p.logits = memory + 16, p.grad = memory + 32;
            check(forward && where(plan_of_bits(p, 132)) == where(forward),
                  "%lld classes: bits of a copy lie elsewhere", (long long)classes);
            p.logits = memory + bytes_of(dtype), p.grad = nullptr;
            check(!plan_of_bits(p, 132), "%lld classes: bits of logits that are not aligned", (long long)classes);
            p.logits = memory, p.logits_stride.inner = classes + 8;
            check(!plan_of_bits(p, 132), "%lld classes: bits of rows with gaps", (long long)classes);
        }
}

// Every class has one thread and one place there.
inline void check_shared_out(const char* what, std::int64_t classes, int lanes, int held,
                             const std::function<ClassesOfThread(int)>& of_lane) {
    std::vector<int> owners(classes);
    bool fits = true;
    for (int lane = 0; lane < lanes; ++lane) {
        const ClassesOfThread mine = of_lane(lane);
        fits &= mine.count <= held && mine.count <= mine.most;
        for (int k = 0; k < mine.count; ++k) {
            ++owners[mine.first + k * mine.step];
            fits &= mine.place_of(mine.first + k * mine.step) == k;
        }
    }
    check(fits && std::count(owners.begin(), owners.end(), 1) == classes, "%lld classes, %d lanes of %d: %s",
          (long long)classes, lanes, held, what);
}

inline void test_kept_plans() {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16})
        for (const int numbers : {1, 2, 3})
            for (int classes = 1; classes < 200000; classes += 1 + classes / 3) {
                RowProblem p;
                p.dtype = dtype, p.inner = 1000, p.num_classes = classes;
                p.logits_stride = p.grad_stride = {0, classes};
                if (const RegisterPlan plan = plan_kept_tiles(p, numbers, 132))
                    check_shared_out("tiles", classes, plan.lanes, plan.held,
                                     [&](int lane) { return ClassesOfThread(classes, lane, plan.rounds); });
                check(classes > 400 || plan_kept_tiles(p, numbers, 132), "%d classes: no tiles", classes);
                const RegisterPlan plan = plan_kept_rows(p, numbers, 16);
                check(plan || classes > 65536, "%d classes: no room", classes);
                for (int rank = 0; rank < plan.cluster && plan; ++rank) {
                    const int begin = std::min(classes, rank * plan.block_part);
                    const int end = std::min(classes, begin + plan.block_part);
                    check_shared_out("rows", end - begin, plan.lanes, plan.held,
                                     [&](int lane) { return ClassesOfThread(0, end - begin, lane, plan.lanes); });
                }
                check(!plan || plan.block_part * plan.cluster >= classes, "%d classes: too little for a block",
                      classes);
            }
}

inline void test_column_plans() {
    RowProblem p;
    p.dtype = Dtype::kBFloat16, p.outer = 2, p.inner = 64 * 64;
    for (int classes = 1; classes <= 192; ++classes)
        for (const KernelKind kind : {KernelKind::kNoFactors, KernelKind::kUnitFactors, KernelKind::kReadFactors}) {
            p.num_classes = classes, p.logits_class_stride = p.grad_class_stride = p.inner;
            p.logits_stride = p.grad_stride = {p.inner * classes, 1};
            const RegisterPlan plan = plan_columns(p, kind);
            check(plan && plan.is_paired && plan.kind == kind, "%d classes: not in columns", classes);
            if (!plan) continue;
            const ColumnKernel& kernel = kColumnKernels[plan.kernel];
            check(kernel.kind == kind && kernel.held * plan.lanes >= classes &&
                      classes / plan.lanes >= kernel.always() && plan.threads <= kMostColumnThreads,
                  "%d classes: %d parts of %d", classes, plan.lanes, plan.held);
        }
    p.num_classes = 5000;
    check(!plan_columns(p, KernelKind::kNoFactors) && !plan_kept_rows(p, 1, 16) && plan_any_rows(p, 1),
          "5000 classes: any rows");
    p.num_classes = 150, p.inner = p.logits_class_stride = p.grad_class_stride = 63 * 63;
    check(plan_columns(p, KernelKind::kNoFactors) && !plan_columns(p, KernelKind::kNoFactors).is_paired,
          "an odd number of pixels");
    p.logits_class_stride = std::int64_t(1) << 31;
    check(!plan_columns(p, KernelKind::kNoFactors), "classes too far apart");
    p.dtype = Dtype::kFloat64;
    check(!plan_columns(p, KernelKind::kNoFactors), "doubles");
}

}  // namespace fused_losses_test
