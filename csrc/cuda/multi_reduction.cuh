// Multi-reduction losses (core/multi_reduction_loss.h). A row is read once: until its gradient is written it stays
// with the threads that share it, in registers where it can (register_multi_reduction.cuh), else in shared memory, as
// floats whatever its dtype, with what the loss keeps of each class. Longer rows are read again in each pass. Forward
// with its gradient, or backward alone.
#pragma once

#include "cuda/kept_rows.cuh"
#include "cuda/multi_reduction.h"
#include "cuda/register_multi_reduction.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {

template <class A>
FL_DEVICE A margin_of(const RowArgs<A>& args, int cls) {
    const RowProblem& p = args.problem;
    return p.first_param ? as<A>(p.first_param)[cls * p.first_param_stride] : args.params[0];
}

// kKeeps: the whole row has a place in shared memory.
template <class Loss, class A, bool kKeeps>
class MultiReductionRow {
    using State = typename Loss::template State<A>;

public:
    // Numbers of a class, the last of them in the place of the logit: what is kept last is kept by the last pass that
    // needs the logit.
    static constexpr int n = kKeeps ? Loss::num_kept : 1;

    FL_DEVICE MultiReductionRow(const PlannedArgs<A>& a, const ClassesOfThread& c, void* memory)
        : args(a),
          p(a.problem),
          classes(c),
          slots{static_cast<A*>(memory) + threadIdx.x * a.plan.pitch},
          bias(bias_of(a)),
          inverse_denominator(written_inverse_denominator<A>(p)) {}

    // For all threads of the team. Those of rows that do not exist, or are ignored, have something to do for the
    // others' sake.
    template <class Team>
    FL_DEVICE void run(Team& team, const Row& row, bool exists, const RowPlace& place, LossSums& sums) const {
        const Target target = exists ? target_of(p, row) : Target{0, true};
        const bool reads = exists && !target.ignored;
        const bool looks = kKeeps && p.argmax;
        OfThread mine{place, reads || (exists && looks) ? classes.count : 0, -1, A(0)};
        if (reads) mine.target_logit = read_logit<A>(p.dtype, place, target.cls) + bias;
        if (kKeeps) read(mine, 0);
        if constexpr (kKeeps)
            if (looks)  // while no target has its place among the numbers: of the logits as they are
                take_row_statistics<A>(
                    team, p, row.number, target, exists,
                    part_of_kept<A, n>(p.dtype, place, classes, [&](auto body) { each_class(mine, body); }));
        if (reads) {
            mine.target_at = classes.place_of(target.cls);
            if (kKeeps) place_target(mine, 0);
        } else {
            mine.count = 0;
        }
        State state{};
        A scale = A(0);
        if (args.is_saved) {
            if (reads) {
                state = saved_state<State, A>(p, row.number);
                scale = scale_of<A>(p, row) * class_weight_of<A>(p, target);
            }
        } else {
            state = reduce(team, mine, target);
            const A weight = reads ? class_weight_of<A>(p, target) * sample_weight_of<A>(p, row) : A(0);
            if (team.leads && exists) record_row<Loss>(args, row, reads, weight, state, sums);
            if (reads) scale = weight * args.upstream_of(row, inverse_denominator);  // of an ignored row anything
        }
        // All have read the target's logit: in a tile, the gradient may be written in its place. Shuffles do not
        // promise that.
        if (args.is_saved || std::is_same_v<std::remove_const_t<Team>, LaneTeam<>>) team.sync();
        if (p.grad && exists) write_gradient(mine, reads, state, scale);
    }

private:
    struct OfThread {
        RowPlace place;
        int count, target_at;
        A target_logit;  // bias added
    };

    FL_DEVICE int held() const { return args.plan.held; }
    FL_DEVICE int class_at(int k) const { return classes.first + k * classes.step; }

    FL_DEVICE void read(const OfThread& mine, int begin) const {
        read_into(slots, p.dtype, mine.place, classes, begin, min(mine.count - begin, held()));
        place_target(mine, begin);
    }

    // The target's logit with its bias, if it is one of the thread's.
    FL_DEVICE void place_target(const OfThread& mine, int begin) const {
        const int count = min(mine.count - begin, held()), own = mine.target_at - begin;
        if (static_cast<unsigned>(own) < static_cast<unsigned>(max(count, 0))) slots.of(own)[n - 1] = mine.target_logit;
    }

    // body(numbers of the class, its number among the thread's) for all of them. If not all are kept at once, end_run()
    // after those that are.
    template <class Body, class EndRun = void (*)()>
    FL_DEVICE void each_class(const OfThread& mine, Body body, EndRun end_run = [] {}) const {
        for (int begin = 0; begin < mine.count; begin += held()) {
            if (!kKeeps) read(mine, begin);
            const int count = min(mine.count - begin, held());
#pragma unroll kUnroll
            for (int k = 0; k < count; ++k) body(slots.of(k), begin + k);
            if (kKeeps) break;
            end_run();
        }
    }
    static constexpr int kUnroll = Loss::needs_max ? 1 : 4;  // of short formulas

    template <class Team>
    FL_DEVICE State reduce(Team& team, const OfThread& mine, const Target& target) const {
        RowInputs<A> inputs{A(0), mine.target_logit, margin_of(args, target.cls), A(p.num_classes)};
        if constexpr (Loss::needs_max) {
            A top = -std::numeric_limits<A>::infinity();
            each_class(mine, [&](const A* kept, int) { top = Larger()(top, kept[n - 1]); });
            inputs.max = largest_of(team, top);
        }
        State state = Loss::begin(inputs, args.params);
        const int last = passes_of<Loss>(p.params) - 1;
        for (int pass = 0; pass < last; ++pass) run_pass<false>(team, pass, mine, state, inputs);
        run_pass<true>(team, last, mine, state, inputs);
        return state;
    }

    template <bool last, class Team>
    FL_DEVICE void run_pass(Team& team, int pass, const OfThread& mine, State& state,
                            const RowInputs<A>& inputs) const {
        constexpr int count = last ? Loss::num_sums : Loss::num_early_sums;
        if constexpr (count > 0) {
            A sums[count] = {}, runs[count] = {};  // of this run of classes, of those before
            const auto add = [&](A* kept, int number) {
                const auto term =
                    Loss::template map<last>(pass, state, kept[n - 1], margin_of(args, class_at(number)),
                                             number == mine.target_at, args.params, kKeeps ? kept : nullptr);
#pragma unroll
                for (int i = 0; i < count; ++i) sums[i] += term.v[i];
            };
            each_class(mine, add, [&] {
#pragma unroll
                for (int i = 0; i < count; ++i) runs[i] += sums[i], sums[i] = A(0);
            });
            auto& totals = kKeeps ? sums : runs;
            team.reduce(totals, A(0), Plus());
            Sums<A, Loss::num_sums> all{};
#pragma unroll
            for (int i = 0; i < count; ++i) all.v[i] = totals[i];
            Loss::finalize(pass, state, all, inputs, args.params);
        }
    }

    FL_DEVICE void write_gradient(const OfThread& mine, bool reads, const State& state, A scale) const {
        for (int begin = 0; begin < classes.count; begin += held()) {
            const int count = min(classes.count - begin, held());
            if (!kKeeps) read(mine, begin);
#pragma unroll kUnroll
            for (int k = 0; k < count; ++k) {
                A* const kept = slots.of(k);
                const bool own = begin + k == mine.target_at;
                const A margin = margin_of(args, class_at(begin + k));
                A g = A(0);
                if (reads)
                    g = kKeeps && !args.is_saved ? Loss::gradient(state, kept, own, args.params)
                                                 : gradient_at<Loss>(state, kept[n - 1], margin, own, args.params);
                kept[n - 1] = scale * g;
            }
            write_from(slots, p.dtype, mine.place, classes, begin, count);
            if (kKeeps) break;
        }
    }

    const PlannedArgs<A>& args;
    const RowProblem& p;
    const ClassesOfThread classes;
    const Slots<A, n> slots;
    const A bias, inverse_denominator;
};

template <class Loss>
__global__ void __launch_bounds__(kTileThreads, 6) multi_reduction_in_tiles(const __grid_constant__ RegisterArgs args) {
    work_on_tiles<MultiReductionRow<Loss, float, true>>(args);
}

template <class Loss, class A, bool kKeeps>
__global__ void __launch_bounds__(kKeeps ? kMostColumnThreads : kBlock, sizeof(A) == 4 && Loss::num_kept < 3 ? 2 : 1)
    multi_reduction_of_rows(const __grid_constant__ PlannedArgs<A> args) {
    work_on_rows<A, MultiReductionRow<Loss, A, kKeeps>>(args);
}

// Rows that are read again in each pass: then statistics may as well have a launch of their own.
template <class Loss, class A>
cudaError_t enqueue_any_rows(PlannedArgs<A>& args, cudaStream_t stream) {
    if (args.problem.argmax)
        if (const cudaError_t error = enqueue_row_statistics(args.problem, stream); error != cudaSuccess) return error;
    args.plan = plan_any_rows(args.problem, MultiReductionRow<Loss, A, false>::n);
    return launch_rows_resident(&multi_reduction_of_rows<Loss, A, false>, args, stream);
}

template <class Loss>
cudaError_t enqueue_multi_reduction_of(const RowProblem& p, const LossOutput& out, Direction direction,
                                       cudaStream_t stream) {
    if (p.dtype == Dtype::kFloat64) {
        PlannedArgs<double> args(p, out);
        args.take_direction(direction);
        return enqueue_any_rows<Loss>(args, stream);
    }
    RegisterArgs args(p, out);
    args.take_direction(direction);
    cudaError_t error = kDoesNotFit;
    visit_variant<Loss>(p.params, [&]<class Variant>() {
        if (has_one_param_a_row<Variant>(p)) error = enqueue_multi_reduction_in_registers<Variant>(args, stream);
        if (p.bits && direction == Direction::kForward) return;  // the others leave none
        using Kept = std::conditional_t<RegisterTraits<Variant>::is_held, Variant, Loss>;
        if (error == kDoesNotFit)
            error = launch_kept<RegisterArgs>(
                {&multi_reduction_in_tiles<Loss>, &multi_reduction_of_rows<Kept, float, true>, Loss::num_kept}, args,
                stream);
    });
    const bool is_done = error != kDoesNotFit || (p.bits && direction == Direction::kForward);
    return is_done ? error : enqueue_any_rows<Loss>(args, stream);
}

}  // namespace fused_losses::cuda
