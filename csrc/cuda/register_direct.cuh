// Rows that are longer than a few lanes can hold: a warp, a block or the blocks of a cluster have the row in registers,
// read by 16 bytes whatever its alignment: the few numbers before the first and after the last such boundary are a
// lane's each. While they work on a row the next one is on its way to shared memory, where each thread finds what it
// has asked for itself, so that nobody waits for anybody.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/register_statistics.cuh"

namespace fused_losses::cuda {

constexpr int kMostWarps = kMostThreads / 32;

using BlockTeam = RowTeam<float, false>;

// The thread's part of a row, of which each block of a cluster has consecutive accesses. What is beside the accesses is
// the first block's. Words: those that the thread holds.
template <class Stored, class Team, class Words>
class DirectPlace {
    static constexpr int n = kVector<Stored>;

public:
    static constexpr bool kIsMixed = false, kMayHaveExtra = true, exists = true;
    const int head, left;

    // following: the row to bring when this one has been read, -1 for none.
    FL_DEVICE DirectPlace(const RegisterArgs& a, const Team& t, int i, int following)
        : head(-misalignment(row_of(a.problem.logits, a.plan.logits_step, i)) & (n - 1)),
          left(min(accesses_of(a, head) - t.block_rank() * a.plan.block_part, a.plan.block_part) - t.lane),
          args(a),
          team(t),
          number(i),
          next(following) {}

    // Begins to bring the accesses of row i, once those before have been read.
    static FL_DEVICE void bring(const RegisterArgs& a, const Team& t, int i) {
        const DirectPlace place(a, t, i, -1);
        const uint4* const from = reinterpret_cast<const uint4*>(place.logits() + place.head) + place.at();
        uint4* const to = place.brought();
        Words::each_round([&](int k) {
            if (Words::has_round(place, k)) __pipeline_memcpy_async(to + k * t.threads, from + k * t.threads, 16);
        });
        __pipeline_commit();
    }
    static FL_DEVICE void wait_until_brought() {
        __pipeline_wait_prior(0);
#ifdef __CUDA_ARCH__
        asm volatile("" ::: "memory");  // no load of what was brought may come before
#endif
    }
    FL_DEVICE void has_been_read() const {
        if (next >= 0) bring(args, team, next);
    }

    FL_DEVICE const Stored* logits() const { return row_of(args.problem.logits, args.plan.logits_step, number); }
    FL_DEVICE Stored* grad() const {
        return const_cast<Stored*>(row_of(args.problem.grad, args.plan.grad_step, number));
    }
    FL_DEVICE const uint4* from() const { return brought(); }
    FL_DEVICE uint4* to() const { return reinterpret_cast<uint4*>(grad() + head) + at(); }
    FL_DEVICE int step() const { return team.threads; }
    FL_DEVICE int first() const { return head + at() * n; }
    FL_DEVICE bool may_have_extra() const { return args.plan.is_ragged; }
    FL_DEVICE int extra() const {
        if (!may_have_extra()) return -1;
        const int i = team.lane < head ? team.lane : team.lane + accesses_of(args, head) * n;
        return i < classes_of(args) && team.block_rank() == 0 ? i : -1;
    }
    FL_DEVICE bool owns(int cls) const {
        if (team.lane != 0 || team.num_blocks() == 1) return team.lane == 0;
        const int accesses = accesses_of(args, head), access = cls < head ? accesses : (cls - head) / n;
        return (access < accesses ? access / args.plan.block_part : 0) == team.block_rank();
    }

private:
    // Rows are so many bytes apart: one multiplication of 32 bits.
    static FL_DEVICE const Stored* row_of(const void* rows, unsigned step, int number) {
        return reinterpret_cast<const Stored*>(static_cast<const char*>(rows) +
                                               std::uint64_t(step) * static_cast<unsigned>(number));
    }
    static FL_DEVICE int classes_of(const RegisterArgs& a) { return static_cast<int>(a.problem.num_classes); }
    static FL_DEVICE int accesses_of(const RegisterArgs& a, int head) {
        return static_cast<int>(static_cast<unsigned>(classes_of(a) - head) / n);
    }
    FL_DEVICE int at() const { return team.block_rank() * args.plan.block_part + team.lane; }
    FL_DEVICE uint4* brought() const {
        return dynamic_shared + team.place() * team.threads * Words::kRounds + team.lane;
    }

    const RegisterArgs& args;
    const Team& team;
    const int number, next;
};

// The frame of a kernel. Worker: see register_words.cuh.
template <class Worker>
FL_DEVICE void work_on_direct_rows(const RegisterArgs& args) {
    using Packed = typename Worker::Packed;
    using Stored = typename Worker::Stored;
    using Team = typename Worker::Team;
    using Words = typename Worker::Words;
    using Place = DirectPlace<Stored, Team, Words>;
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    const bool leaves_statistics = Worker::kMayLeaveStatistics && p.argmax;
    const auto brings = [&](const Packed& target) {
        return Worker::kReadsRows && (leaves_statistics || Worker::is_read(target, true));
    };
    Team team(args.plan);
    const int rows = static_cast<int>(p.inner), step = static_cast<int>(team.step());
    int number = static_cast<int>(team.first()) + team.place();
    Packed target(args, Packed::load(args, number, number < rows), number < rows);
    LoadedLabel label = Packed::load(args, number + step, number + step < rows);
    if (number < rows && brings(target)) Place::bring(args, team, number);
    wait_for_kernel_before();
    __shared__ LossSums of_team[kMostWarps];
    LossSums& sums = of_team[threadIdx.x / 32];  // of the leading thread, whose registers have other uses
    if (team.leads) sums = {0, 0};
    const Worker worker(args, sums);
    for (; number < rows; number += step) {
        const Packed next(args, label, number + step < rows);
        label = Packed::load(args, number + 2 * step, number + 2 * step < rows);  // arrives while this row is worked on
        const Place place(args, team, number, number + step < rows && brings(next) ? number + step : -1);
        Place::wait_until_brought();
        if constexpr (Worker::kMayLeaveStatistics)
            if (leaves_statistics)
                take_row_statistics<Stored>(team, p, number, target.unpacked(), true, PartOfWords<Words, Place>(place));
        if (!Worker::is_read(target, true)) {
            place.has_been_read();
            worker.ignore(team, number);
            worker.write_zeros(place);
        } else {
            worker.run(team, number, target, place);
        }
        target = next;
    }
    team.part_company();
    __syncwarp();
    write_loss(args, team.leads ? sums : LossSums{0, 0});
}

}  // namespace fused_losses::cuda
