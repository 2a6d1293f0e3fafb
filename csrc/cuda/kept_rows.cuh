// The frame of kernels whose threads keep their classes of a row as floats, whatever the dtype, from the only read to
// the write of the gradient. What is done with a row is a Worker's business:
//
//     Worker(args, classes of the thread, shared memory for its numbers)
//     run(team, row, exists, place, sums)      for all threads of the team; of a row that is not there, too
#pragma once

#include "cuda/loss_output.cuh"
#include "cuda/row_part.cuh"
#include "cuda/row_team.cuh"
#include "cuda/statistics_output.cuh"
#include "cuda/warp_tiles.cuh"

namespace fused_losses::cuda {

// Of a row whose logits are the last of n numbers of each class: for row statistics. each_class(body): body(numbers of
// a class, its number among the thread's).
template <class A, int n, class EachClass>
FL_DEVICE auto part_of_kept(Dtype dtype, const RowPlace& place, const ClassesOfThread& classes, EachClass each_class) {
    const auto each = [&classes, each_class](auto body) {
        each_class([&](const A* kept, int number) {
            const A only[] = {kept[n - 1]};
            body(only, classes.first + number * classes.step);
        });
    };
    return part_of_row<A>(each, [dtype, &place](int cls) { return read_logit<A>(dtype, place, cls); });
}

// Rows in tiles, of some lanes of a warp each.
template <class Worker, class Args>
FL_DEVICE void work_on_tiles(const Args& args) {
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    const int classes = static_cast<int>(p.num_classes), element = bytes_of(p.dtype), lanes = args.plan.lanes;
    const LaneTeam team(lanes);
    const int own = threadIdx.x % 32 / lanes, at_once = 32 / lanes;
    __shared__ LossSums of_thread[kTileThreads];
    LossSums& sums = of_thread[threadIdx.x];  // registers have other uses
    sums = {0, 0};
    const auto prepare = [&] {
        wait_for_kernel_before();
        return Worker(args, ClassesOfThread(classes, team.lane, args.plan.rounds), behind_tiles(args.plan));
    };
    for_each_tile<4>(args, prepare, [&](const Worker& worker, int first, int count, char* tile, auto arrive) {
        arrive();
#pragma unroll 1
        for (int r = own; r - own < count; r += at_once) {
            const bool exists = r < count;
            char* const at = tile + (exists ? r * args.plan.row_bytes : 0);
            worker.run(team, {first + r, 0, first + r}, exists, RowPlace{at, at, element, element}, sums);
        }
    });
    write_loss(args, sums);
}

// Rows that lie anyhow, of a RowTeam each.
template <class A, class Worker, class Args>
FL_DEVICE void work_on_rows(const Args& args) {
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    RowTeam<A, true> team(args.plan);
    LossSums sums{0, 0};
    const int classes = static_cast<int>(p.num_classes), begin = cluster_group::block_rank() * args.plan.block_part;
    const Worker worker(args,
                        ClassesOfThread(begin, min(classes, begin + args.plan.block_part), team.lane, team.threads),
                        dynamic_shared);
    const std::int64_t rows = p.rows();
    for (std::int64_t first = team.first(); first < rows; first += team.step()) {
        const std::int64_t number = first + team.place();
        const bool exists = number < rows;
        const Row row = row_at(p, exists ? number : first);
        worker.run(team, row, exists, place_of(p, row), sums);
    }
    team.part_company();
    write_loss(args, sums);
}

// The kernels for either, and how many numbers of a class they keep.
template <class Args>
struct KeptKernels {
    void (*in_tiles)(Args);
    void (*of_rows)(Args);
    int numbers;
};

// By the first that has room for the rows; kDoesNotFit if none has.
template <class Args>
cudaError_t launch_kept(const KeptKernels<Args>& kernels, Args& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    const cudaError_t error = launch_in_tiles(
        args.plan, [&](int multiprocessors) { return plan_kept_tiles(p, kernels.numbers, multiprocessors); },
        [&] { return launch_tiles_resident(kernels.in_tiles, args, stream); });
    if (error != kDoesNotFit) return error;
    return launch_in_clusters(
        args.plan, [&](int largest) { return plan_kept_rows(p, kernels.numbers, largest); },
        [&] { return launch_rows_resident(kernels.of_rows, args, stream); });
}

}  // namespace fused_losses::cuda
