// Softmax losses of rows that are longer than a few lanes can hold: a warp, a block or the blocks of a cluster have the
// row in registers, read straight from device memory by 16 bytes whatever its alignment: the few numbers before the
// first and after the last such boundary are a lane's each. Forward with its gradient, or backward alone.
#include "cuda/register_row.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kMostWarps = kMostThreads / 32;

using RegisterTeam = RowTeam<float, false>;

// The thread's part of a row, of which each block of a cluster has consecutive accesses. What is beside the accesses is
// the first block's.
template <class Stored>
class DirectPlace {
    static constexpr int n = kVector<Stored>;

public:
    static constexpr bool exists = true;
    int left;

    FL_DEVICE DirectPlace(const RegisterArgs& a, const RegisterTeam& t, std::int64_t i)
        : args(a), team(t), number(i), head(a.plan.is_ragged ? min(classes(), -misalignment(logits()) & (n - 1)) : 0) {
        const int begin = cluster_group::block_rank() * args.plan.share;
        left = min(accesses() - begin, args.plan.share) - team.lane;
    }

    FL_DEVICE const Stored* logits() const {
        return as<Stored>(args.problem.logits) + number * args.problem.logits_stride.inner;
    }
    FL_DEVICE Stored* grad() const {
        return static_cast<Stored*>(args.problem.grad) + number * args.problem.grad_stride.inner;
    }
    FL_DEVICE const uint4* from() const { return reinterpret_cast<const uint4*>(logits() + head) + at(); }
    FL_DEVICE uint4* to() const { return reinterpret_cast<uint4*>(grad() + head) + at(); }
    FL_DEVICE int step() const { return team.threads; }
    FL_DEVICE int first() const { return head + at() * n; }
    FL_DEVICE int extra() const {
        const int i = team.lane < head ? team.lane : team.lane + accesses() * n;
        return i < classes() && cluster_group::block_rank() == 0 ? i : -1;
    }
    FL_DEVICE bool owns(int cls) const {
        if (team.lane != 0 || cluster_group::num_blocks() == 1) return team.lane == 0;
        const int access = cls < head ? accesses() : (cls - head) / n;
        return (access < accesses() ? access / args.plan.share : 0) == cluster_group::block_rank();
    }

private:
    FL_DEVICE int classes() const { return static_cast<int>(args.problem.num_classes); }
    FL_DEVICE int accesses() const { return static_cast<int>(static_cast<unsigned>(classes() - head) / n); }
    FL_DEVICE int at() const { return cluster_group::block_rank() * args.plan.share + team.lane; }

    const RegisterArgs& args;
    const RegisterTeam& team;
    const std::int64_t number;
    const int head;
};

template <class Stored, bool kFactors, int kHeld>
__global__ void __launch_bounds__(most_direct_threads(sizeof(Stored)), 1)
    softmax_in_registers(const __grid_constant__ RegisterArgs args) {
    const RowProblem& p = args.problem;
    if (args.is_saved && is_already_written<float>(p)) return;
    RegisterTeam team(args.plan);
    __shared__ LossSums of_team[kMostWarps];
    LossSums& sums = of_team[threadIdx.x / 32];  // of the leading thread, whose registers have other uses
    if (team.leads) sums = {0, 0};
    const RegisterRow<Stored, kFactors, uint4, kHeld / kVector<Stored>, RegisterTeam> worker(args, sums);
    const int rows = static_cast<int>(p.inner), step = static_cast<int>(team.step());
    int number = static_cast<int>(team.first()) + team.place();
    PackedTarget next(args, number, number < rows);
    for (; number < rows; number += step) {
        const PackedTarget target = next;
        next = PackedTarget(args, number + step, number + step < rows);  // arrives while this row is worked on
        worker.run(team, number, target, DirectPlace<Stored>(args, team, number));
    }
    team.part_company();
    __syncwarp();
    write_loss(args, team.leads ? sums : LossSums{0, 0});
}

}  // namespace

template <class Stored, bool kFactors>
cudaError_t enqueue_registers(RegisterArgs& args, cudaStream_t stream) {
    const auto with = [&]<int kHeld>() {
        return launch_rows_resident(&softmax_in_registers<Stored, kFactors, kHeld>, args, stream);
    };
    if constexpr (kFactors)
        return with.template operator()<kDirectHeldWithFactors>();
    else
        return args.plan.held == 24 ? with.template operator()<24>() : with.template operator()<32>();
}

#define FL_REGISTERS(Stored)                                                            \
    template cudaError_t enqueue_registers<Stored, false>(RegisterArgs&, cudaStream_t); \
    template cudaError_t enqueue_registers<Stored, true>(RegisterArgs&, cudaStream_t);
FL_REGISTERS(float)
FL_REGISTERS(Half)
FL_REGISTERS(BFloat16)

}  // namespace fused_losses::cuda
