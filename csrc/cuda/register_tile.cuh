// Rows of up to 400 classes: a warp brings a tile of whole rows to shared memory with accesses of 16 bytes, whatever
// the number of classes, while it works on another; a row is then in the registers of one to 32 lanes.
#pragma once

#include "cuda/register_statistics.cuh"
#include "cuda/warp_tiles.cuh"

namespace fused_losses::cuda {

// The lane's part of the rows in a tile, the same in each but for where the row begins. Where an odd number of classes
// have two bytes each, one of a row's numbers is beside its words, at either end.
struct LanePart {
    int lane, begin, words;
    bool is_ragged;
    int beside;  // class of the number beside the words where that is the last one, -1 in lanes that have none

    FL_DEVICE LanePart(const RegisterArgs& a, int l, int numbers_of_word)
        : lane(l),
          begin(a.plan.begin_of(l)),
          words(a.plan.count_of(l, static_cast<int>(a.problem.num_classes) / numbers_of_word)),
          is_ragged(a.plan.is_ragged),
          beside(l == 0 ? static_cast<int>(a.problem.num_classes) - 1 : -1) {
#ifdef __CUDA_ARCH__
        asm("" : "+r"(begin), "+r"(words), "+r"(beside));  // not to be recomputed for each row
#endif
    }
};

// kMayBeRagged: whether there may be such a number.
template <class Stored, bool kMayBeRagged>
class TilePlace {
    static constexpr int n = Word<Stored>::count;

public:
    static constexpr bool kIsMixed = true, kMayHaveExtra = n > 1 && kMayBeRagged;
    const int left;
    const bool exists;

    // before: numbers to the row's first whole word. is_left_out: zeros are read in its place.
    FL_DEVICE TilePlace(const LanePart& p, Stored* x, int before, const unsigned* z, bool is_left_out, bool there)
        : left(p.words), exists(there), part(p), row(x), skip(before), zeros(z), left_out(is_left_out) {}

    FL_DEVICE const Stored* logits() const { return row; }
    FL_DEVICE Stored* grad() const { return row; }
    FL_DEVICE const unsigned* from() const { return left_out ? zeros : to(); }
    FL_DEVICE unsigned* to() const { return reinterpret_cast<unsigned*>(row + skip) + part.begin; }
    static FL_DEVICE int step() { return 1; }
    FL_DEVICE int first() const { return skip + part.begin * n; }
    FL_DEVICE bool may_have_extra() const { return kMayHaveExtra && part.is_ragged; }
    FL_DEVICE int extra() const {
        if (!may_have_extra()) return -1;
        return skip > 0 ? part.beside >> 31 : part.beside;
    }
    FL_DEVICE bool owns(int) const { return part.lane == 0; }
    FL_DEVICE void has_been_read() const {}

private:
    const LanePart& part;
    Stored* const row;
    const int skip;
    const unsigned* const zeros;
    const bool left_out;
};

// The frame of a kernel. Worker: see register_words.cuh.
template <class Worker>
FL_DEVICE void work_on_register_tiles(const RegisterArgs& args) {
    using Stored = typename Worker::Stored;
    using Team = typename Worker::Team;
    using Packed = typename Worker::Packed;
    constexpr int n = Word<Stored>::count;
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    const int classes = static_cast<int>(p.num_classes);
    Team team(args.plan.lanes);
    __shared__ struct {
        LossSums of_thread[kTileThreads];  // registers have other uses
        unsigned zeros[Worker::kRounds];
    } shared;
    LossSums& sums = shared.of_thread[threadIdx.x];
    sums = {0, 0};
    for (int k = threadIdx.x; k < Worker::kRounds; k += kTileThreads) shared.zeros[k] = 0;
    __syncthreads();
    const int own = threadIdx.x % 32 / team.lanes, at_once = 32 / team.lanes, rows = static_cast<int>(p.inner);
    const LanePart part(args, team.lane, n);
    const auto prepare = [&] {
        wait_for_kernel_before();
        return Worker(args, sums);
    };
    int number = (blockIdx.x * (kTileThreads / 32) + threadIdx.x / 32) * args.plan.tile_rows + own;
    LoadedLabel label = Packed::load(args, number, number < rows);  // arrives while the row before is worked on
    // From the last row of a tile to the first of the next one; from any other the next is at_once further.
    const unsigned leap = as_new(static_cast<unsigned>(tile_step(args.plan) - args.plan.tile_rows + at_once));
    const auto work = [&](const Worker& worker, int first, int count, char* bytes, auto arrive) {
        number = first + own;
        arrive();
        Stored* row = reinterpret_cast<Stored*>(bytes) + own * classes;
#pragma unroll 1
        for (int trips = (count + at_once - 1) / at_once; trips > 0; --trips) {
            const bool exists = number < rows;
            const Packed target(args, label, exists);
            const int next = number + (trips > 1 ? at_once : static_cast<int>(leap));
            label = Packed::load(args, next, next < rows);
            const int before = Worker::kRagged ? misalignment_in_tile(row) & (n - 1) : 0;
            using Place = TilePlace<Stored, Worker::kRagged>;
            if constexpr (Worker::kMayLeaveStatistics)
                if (p.argmax) {
                    const Place whole(part, row, before, shared.zeros, false, exists);
                    take_row_statistics<Stored>(team, p, number, target.unpacked(), exists,
                                                PartOfWords<typename Worker::Words, Place>(whole));
                }
            worker.run(team, number, target,
                       Place(part, row, before, shared.zeros, !worker.is_read(target, exists), exists));
            number += at_once, row += at_once * classes;
        }
    };
    for_each_tile<most_tile_bytes(Worker::Words::kHeld) / 512, Worker::kReadsRows>(args, prepare, work);
    write_loss(args, sums);
}

}  // namespace fused_losses::cuda
