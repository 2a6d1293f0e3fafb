// Softmax losses of rows that are longer than a few lanes can hold: a warp, a block or the blocks of a cluster have the
// row in registers, read straight from device memory by 16 bytes whatever its alignment: the few numbers before the
// first and after the last such boundary are a lane's each. Forward with its gradient, or backward alone.
#include "cuda/register_row.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kMostWarps = kMostThreads / 32;

using BlockTeam = RowTeam<float, false>;

// The thread's part of a row, of which each block of a cluster has consecutive accesses. What is beside the accesses is
// the first block's.
template <class Stored, class Team>
class DirectPlace {
    static constexpr int n = kVector<Stored>;

public:
    static constexpr bool kIsMixed = false, exists = true;
    const int head, left;

    FL_DEVICE DirectPlace(const RegisterArgs& a, const Team& t, int i)
        : head(-misalignment(row_of(a.problem.logits, a.plan.logits_step, i)) & (n - 1)),
          left(min(accesses_of(a, head) - t.block_rank() * a.plan.share, a.plan.share) - t.lane),
          args(a),
          team(t),
          number(i) {}

    FL_DEVICE const Stored* logits() const { return row_of(args.problem.logits, args.plan.logits_step, number); }
    FL_DEVICE Stored* grad() const {
        return const_cast<Stored*>(row_of(args.problem.grad, args.plan.grad_step, number));
    }
    FL_DEVICE const uint4* from() const { return reinterpret_cast<const uint4*>(logits() + head) + at(); }
    FL_DEVICE uint4* to() const { return reinterpret_cast<uint4*>(grad() + head) + at(); }
    FL_DEVICE int step() const { return team.threads; }
    FL_DEVICE int first() const { return head + at() * n; }
    FL_DEVICE int extra() const {
        if (!args.plan.is_ragged) return -1;
        const int i = team.lane < head ? team.lane : team.lane + accesses_of(args, head) * n;
        return i < classes_of(args) && team.block_rank() == 0 ? i : -1;
    }
    FL_DEVICE bool owns(int cls) const {
        if (team.lane != 0 || team.num_blocks() == 1) return team.lane == 0;
        const int accesses = accesses_of(args, head), access = cls < head ? accesses : (cls - head) / n;
        return (access < accesses ? access / args.plan.share : 0) == team.block_rank();
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
    FL_DEVICE int at() const { return team.block_rank() * args.plan.share + team.lane; }

    const RegisterArgs& args;
    const Team& team;
    const int number;
};

template <Factors kFactors, int kHeld, class Team>
constexpr DirectKernel kKernel{kFactors, std::is_same_v<Team, WarpTeam>, kHeld};

template <class Stored, Factors kFactors, int kHeld, class Team>
__global__ void __launch_bounds__((kKernel<kFactors, kHeld, Team>.most_threads(sizeof(Stored))), 1)
    softmax_in_registers(const __grid_constant__ RegisterArgs args) {
    constexpr int rounds = kHeld / kVector<Stored>, always = kKernel<kFactors, kHeld, Team>.always(rounds);
    const RowProblem& p = args.problem;
    if (args.is_saved && is_already_written<float>(p)) return;
    Team team(args.plan);
    __shared__ LossSums of_team[kMostWarps];
    LossSums& sums = of_team[threadIdx.x / 32];  // of the leading thread, whose registers have other uses
    if (team.leads) sums = {0, 0};
    const RegisterRow<Stored, kFactors, uint4, rounds, always, Team> worker(args, sums);
    const int rows = static_cast<int>(p.inner), step = static_cast<int>(team.step());
    int number = static_cast<int>(team.first()) + team.place();
    PackedTarget<kFactors> next(args, number, number < rows);
    for (; number < rows; number += step) {
        const PackedTarget<kFactors> target = next;
        next = {args, number + step, number + step < rows};  // arrives while this row is worked on
        const DirectPlace<Stored, Team> place(args, team, number);
        if (!worker.is_read(target, true)) {
            worker.ignore(team, number);
            worker.write_zeros(place);
        } else {
            worker.run(team, number, target, place);
        }
    }
    team.part_company();
    __syncwarp();
    write_loss(args, team.leads ? sums : LossSums{0, 0});
}

}  // namespace

template <class Stored>
cudaError_t enqueue_registers(RegisterArgs& args, cudaStream_t stream) {
    cudaError_t error = cudaErrorInvalidValue;
    visit_indices<std::size(kDirectKernels)>([&]<std::size_t i>() {
        constexpr DirectKernel kernel = kDirectKernels[i];
        using Team = std::conditional_t<kernel.of_warps, WarpTeam, BlockTeam>;
        if (args.plan.kernel == i)
            error =
                launch_rows_resident(&softmax_in_registers<Stored, kernel.factors, kernel.held, Team>, args, stream);
    });
    return error;
}

#define FL_REGISTERS(Stored) template cudaError_t enqueue_registers<Stored>(RegisterArgs&, cudaStream_t);
FL_REGISTERS(float)
FL_REGISTERS(Half)
FL_REGISTERS(BFloat16)

}  // namespace fused_losses::cuda
