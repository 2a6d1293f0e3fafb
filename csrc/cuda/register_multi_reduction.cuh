// Multi-reduction losses on rows in registers: read once, then the numbers that the loss keeps of each class take the
// place of the logits, and in the end the gradient does. For losses with RegisterTraits, or whose visit_usual() gives
// one for the parameters; with margins in a tensor if a row has one of them, else without; of rows that a plan has
// registers for.
#pragma once

#include "cuda/register_bits.cuh"
#include "cuda/register_direct.cuh"
#include "cuda/register_tile.cuh"
#include "losses/registry.h"

namespace fused_losses::cuda {

// ---- What is kept of a row ----------------------------------------------------------------------------------------

// For the thread that leads. Of a row that does not count, zeros. Returns the row's weighted value.
template <class Loss, class State, class A>
FL_DEVICE A add_row(const RowArgs<A>& args, bool counts, A weight, const State& state, LossSums& sums) {
    const A value = counts ? weight * Loss::value(state) : A(0);
    const bool is_active = counts & (!args.only_active | !(Loss::value(state) <= A(0)));  // NaN is
    sums.add({static_cast<double>(value), static_cast<double>(is_active ? weight : A(0))});
    return value;
}

template <class Loss, class State, class A>
FL_DEVICE void record_row(const RowArgs<A>& args, const Row& row, bool counts, A weight, const State& state,
                          LossSums& sums) {
    const A value = add_row<Loss>(args, counts, weight, state, sums);
    if (!args.keeps_rows) return;
    A numbers[kStateSize<State, A>] = {};
    if (counts) std::memcpy(numbers, &state, sizeof(state));
    keep_row(args.problem, row, value, numbers);
}

// ---- Rows in registers --------------------------------------------------------------------------------------------

// Losses that know enough of their parameters: what else it takes to keep their rows in registers.
template <class Loss>
struct RegisterTraits {
    static constexpr bool is_held = false;
};
struct HeldLoss {
    static constexpr bool is_held = true;
    static constexpr bool is_relative = true;         // only differences from the largest logit matter
    static constexpr bool leaves_target_out = false;  // the target adds nothing to any sum, nor does a logit of -inf
    static constexpr bool counts_masked = false;      // one with a logit of -inf adds something in the last pass
    static constexpr bool is_long = false;            // a long formula, which needs more registers
    static constexpr bool leaves_bits = false;        // bits of its classes may suffice for the gradient
    static constexpr int most_blocks = 8;             // that fit on a multiprocessor by its registers
};
struct LongLoss : HeldLoss {
    static constexpr bool counts_masked = true;
    static constexpr bool is_long = true;
};
template <bool kThreshold, bool kSquared>
struct RegisterTraits<MarginLoss<AnyMarginPolicy::Knowing<kThreshold, kSquared>>> : HeldLoss {
    static constexpr bool leaves_target_out = true, leaves_bits = !kSquared;
};
template <class Rule, bool kCoarse>
struct RegisterTraits<PowerLoss<Rule, true, kCoarse>> : HeldLoss {
    static constexpr bool counts_masked = true;
    static constexpr int most_blocks = 6;
};
template <int kN>
struct RegisterTraits<BiTemperedOf<kN, true>> : HeldLoss {};
template <bool kCoarse>
struct RegisterTraits<RescaledOf<kCoarse>> : HeldLoss {
    static constexpr bool is_relative = false;
    static constexpr bool leaves_target_out = true;
    static constexpr int most_blocks = 5;
};
template <bool kCoarse>
struct RegisterTraits<NormalizedLoss<NFLMAE::Usual, kCoarse>> : LongLoss {};
template <Second kSecond, bool kCoarse>
struct RegisterTraits<NormalizedLoss<NFLSumOf<kSecond>, kCoarse>> : LongLoss {
    static constexpr bool is_held = kSecond != Second::kAny;
};
template <bool kCoarse>
struct RegisterTraits<LDRKLOf<true, kCoarse>> : LongLoss {
    static constexpr bool is_relative = false;
};

// Of so many blocks on a multiprocessor: those that fit with the registers that the loss needs.
template <class Loss>
constexpr int blocks_of(int blocks) {
    using Traits = RegisterTraits<Loss>;
    return std::min(Traits::most_blocks, Traits::is_long ? std::max(1, 3 * blocks / 4) : blocks);
}

// Kernels are compiled for losses that keep one number of a class, or two.
template <class Loss>
constexpr KernelKind kKeptBy = Loss::num_kept == 1 ? KernelKind::kOneKept : KernelKind::kTwoKept;

// A Worker (register_words.cuh).
template <class Loss, class S, class Access, int kNumRounds, int kAlways, class T, bool kMayBeRagged = true>
class RegisterMultiReduction {
    using Traits = RegisterTraits<Loss>;
    using State = typename Loss::template State<float>;
    static constexpr int n = Loss::num_kept;
    static constexpr bool kIsRelative = Loss::needs_max && Traits::is_relative;
    static constexpr bool kLeavesBits = Traits::leaves_bits && !std::is_same_v<T, LaneTeam<1>>;  // short rows do not
    static constexpr bool kMayHaveMargins = requires(const double* params) { Loss::is_competitors_margin(params); };

public:
    using Stored = S;
    using Team = T;
    using Packed = PackedTarget<KernelKind::kNoFactors>;
    using Words = RegisterWords<S, Access, kNumRounds, kAlways>;
    static constexpr int kRounds = kNumRounds;
    static constexpr bool kRagged = kMayBeRagged, kReadsRows = true, kMayLeaveStatistics = true;

    FL_DEVICE RegisterMultiReduction(const RegisterArgs& a, LossSums& s)
        : args(a),
          p(a.problem),
          sums_of_rows(s),
          bias(bias_of(a)),
          inverse_denominator(written_inverse_denominator<float>(p)) {}

    static FL_DEVICE bool is_read(const Packed& target, bool) { return !target.is_ignored(); }

    FL_DEVICE void ignore(const Team& team, int number) const {
        if (!args.is_saved && team.leads)
            record_row<Loss>(args, row_of_number(number), false, 0.0f, State{}, sums_of_rows);
    }

    template <class Place>
    FL_DEVICE void write_zeros(const Place& place) const {
        if (p.grad) Words::write_zeros(place);
    }

    template <class Place>
    FL_DEVICE void run(Team& team, int number, const Packed& packed, const Place& place) const {
        const bool reads = !Place::kIsMixed || !packed.is_ignored(), is_apart = Traits::leaves_target_out || bias != 0;
        OfRow of{number, packed.cls, 0.0f, args.params[0]};
        if (reads) {
            of.target_logit = to_acc(place.logits()[of.target]) + bias;
            if (kMayHaveMargins && p.first_param)
                of.margin = as<float>(p.first_param)[of.target * p.first_param_stride];
        }
        Numbers numbers;
        const float top = read(team, of, reads, is_apart, place, numbers);
        State state{};
        float scale = 0.0f;
        if (args.is_saved) {
            if (reads) {
                state = saved_state<State, float>(p, number);
                scale = scale_of<float>(p, row_of_number(number)) * class_weight_of<float>(p, {of.target, false});
            }
            each(place, of, numbers, [&](float (&kept)[n], bool is_target, bool) {
                Loss::keep(state, kept[n - 1], of.margin, is_target, args.params, kept);
            });
        } else {
            state = reduce(team, of, kIsRelative ? 0.0f : top, place, numbers);
            const Row row = row_of_number(number);
            if (args.is_plain) [[likely]] {
                scale = inverse_denominator;
                if (team.leads && place.exists) add_row<Loss>(args, reads, 1.0f, state, sums_of_rows);
            } else if (reads) {
                const float weight = class_weight_of<float>(p, {of.target, false}) * sample_weight_of<float>(p, row);
                scale = weight * args.upstream_of(row, inverse_denominator);
                State whole = state;
                if constexpr (kIsRelative) whole.max = top;
                if (team.leads) record_row<Loss>(args, row, true, weight, whole, sums_of_rows);
            } else if (team.leads && place.exists) {
                record_row<Loss>(args, row, false, 0.0f, state, sums_of_rows);
            }
        }
        if constexpr (kLeavesBits)
            if (p.bits && reads)
                RowBits<Words::kHeld>(args, team, number)
                    .write([&](int i) { return numbers.of[i][0] != 0.0f; }, numbers.extra[0] != 0.0f);
        if (args.writes_gradient) write_gradient(team, of, reads, place, numbers, state, scale);
    }

private:
    struct Numbers {
        float of[Words::kHeld][n], extra[n];
    };
    struct OfRow {
        int number, target;
        float target_logit, margin;  // bias added
    };

    // Reads the logits into the last number of each class; that of the target has its bias. Gives the largest logit
    // where forward needs it, else 0. Where the loss depends on differences alone, the largest has been subtracted.
    template <class Place>
    FL_DEVICE float read(Team& team, OfRow& of, bool reads, bool is_apart, const Place& place, Numbers& numbers) const {
        if (Place::kIsMixed && is_apart) {
            team.sync();  // all have read the target's logit
            if (reads && place.owns(of.target)) place.grad()[of.target] = to_stored<Stored>(Words::kLowest);
            team.sync();
        }
        Words words;
        words.read(place);
        float& extra = numbers.extra[n - 1] = reads ? Words::kLowest : 0.0f;  // a row that is left out is one of zeros
        const int extra_class = place.extra();
        if (reads && extra_class >= 0) extra = to_acc(place.logits()[extra_class]);
        if (!Place::kIsMixed && is_apart) words.set_apart(extra, of.target, place);
#pragma unroll
        for (int i = 0; i < Words::kWords; ++i) {
            float z[Words::kCount];
            Word<Stored>::widen(words.w[i], z);
#pragma unroll
            for (int h = 0; h < Words::kCount; ++h) numbers.of[i * Words::kCount + h][n - 1] = z[h];
        }
        if (!Traits::leaves_target_out && is_apart) {
#pragma unroll
            for (int i = 0; i < Words::kHeld; ++i)  // beyond the thread's part the class is another thread's
                if (Words::class_of(place, i) == of.target && Words::has_round(place, i / Words::kNumbers))
                    numbers.of[i][n - 1] = of.target_logit;
            if (extra_class == of.target) extra = of.target_logit;
        }
        if (!Loss::needs_max || args.is_saved) return 0.0f;
        float top = largest_of(team, std::fmax(words.largest(), extra));
        if (is_apart) top = std::fmax(top, of.target_logit);
        if (!kIsRelative) return top;
        of.target_logit -= top;
        each(place, of, numbers, [&](float (&kept)[n], bool, bool) { kept[n - 1] -= top; });
        return top;
    }

    // body(numbers of the class, whether it is the target, whether it is there) for the thread's classes. Beyond the
    // row they are -inf.
    template <class Place, class Body>
    FL_DEVICE void each(const Place& place, const OfRow& of, Numbers& numbers, Body body) const {
#pragma unroll
        for (int i = 0; i < Words::kHeld; ++i)
            body(numbers.of[i], !Traits::leaves_target_out && Words::class_of(place, i) == of.target,
                 Words::has_round(place, i / Words::kNumbers));
        if (!place.may_have_extra()) return;
        if (const int cls = place.extra(); cls >= 0)
            body(numbers.extra, !Traits::leaves_target_out && cls == of.target, true);
    }

    template <class Place>
    FL_DEVICE State reduce(Team& team, const OfRow& of, float top, const Place& place, Numbers& numbers) const {
        const RowInputs<float> inputs{top, of.target_logit, of.margin,
                                      static_cast<float>(static_cast<int>(p.num_classes))};
        State state = Loss::begin(inputs, args.params);
        const int last = passes_of<Loss>(args.params) - 1;
#pragma unroll 1
        for (int pass = 0; pass < last; ++pass) run_pass<false>(team, pass, of, place, numbers, state, inputs);
        run_pass<true>(team, last, of, place, numbers, state, inputs);
        return state;
    }

    template <bool last, class Place>
    FL_DEVICE void run_pass(Team& team, int pass, const OfRow& of, const Place& place, Numbers& numbers, State& state,
                            const RowInputs<float>& inputs) const {
        constexpr int count = last ? Loss::num_sums : Loss::num_early_sums;
        if constexpr (count > 0) {
            float sums[count] = {};
            each(place, of, numbers, [&](float (&kept)[n], bool is_target, bool is_there) {
                const auto term =
                    Loss::template map<last>(pass, state, kept[n - 1], of.margin, is_target, args.params, kept);
#pragma unroll
                for (int i = 0; i < count; ++i)
                    if (!last || !Traits::counts_masked || is_there) sums[i] += term.v[i];
            });
            team.reduce(sums, 0.0f, Plus());
            Sums<float, Loss::num_sums> all{};
#pragma unroll
            for (int i = 0; i < count; ++i) all.v[i] = sums[i];
            Loss::finalize(pass, state, all, inputs, args.params);
        }
    }

    template <class Place>
    FL_DEVICE void write_gradient(const Team& team, const OfRow& of, bool reads, const Place& place, Numbers& numbers,
                                  State& state, float scale) const {
        if (!reads) state = State{}, scale = 0.0f;  // what is kept of zeros is finite
        if constexpr (requires { Loss::scale(state, scale); }) Loss::scale(state, scale), scale = 1.0f;
        const auto gradient = [&](const float (&kept)[n]) {
            return scale * Loss::gradient(state, kept, false, args.params);
        };
        // All have read the target's logit: in a tile, the gradient may be written in its place. Shuffles do not
        // promise that.
        if (Place::kIsMixed) team.sync();
        Words::write(place, [&](int i, bool) { return gradient(numbers.of[i]); });
        if (const int cls = place.extra(); cls >= 0) place.grad()[cls] = to_stored<Stored>(gradient(numbers.extra));
        team.sync();
        if (reads && place.owns(of.target)) {
            const float g = gradient_at<Loss>(state, of.target_logit, of.margin, true, args.params);
            place.grad()[of.target] = to_stored<Stored>(scale * g);
        }
    }

    const RegisterArgs& args;
    const RowProblem& p;
    LossSums& sums_of_rows;
    const float bias, inverse_denominator;
};

template <class Loss, class Stored, int kLanes, int kHeld>
__global__ void __launch_bounds__(kTileThreads, blocks_of<Loss>(tile_blocks(kKeptBy<Loss>, kHeld)))
    multi_reduction_in_register_tiles(const __grid_constant__ RegisterArgs args) {
    constexpr TileKernel kernel{kKeptBy<Loss>, kLanes, kHeld};
    constexpr int rounds = kHeld / Word<Stored>::count, always = kernel.always(rounds);
    using Team = LaneTeam<kLanes>;
    work_on_register_tiles<RegisterMultiReduction<Loss, Stored, unsigned, rounds, always, Team, kernel.takes_ragged()>>(
        args);
}

template <class Loss, int kHeld, class Team>
constexpr DirectKernel kMultiReductionKernel{kKeptBy<Loss>, std::is_same_v<Team, WarpTeam>, kHeld};

template <class Loss, class Stored, int kHeld, class Team>
__global__ void __launch_bounds__((kMultiReductionKernel<Loss, kHeld, Team>.most_threads(sizeof(Stored))),
                                  (blocks_of<Loss>(kMultiReductionKernel<Loss, kHeld, Team>.blocks())))
    multi_reduction_in_registers(const __grid_constant__ RegisterArgs args) {
    constexpr int rounds = kHeld / kVector<Stored>, always = kMultiReductionKernel<Loss, kHeld, Team>.always(rounds);
    work_on_direct_rows<RegisterMultiReduction<Loss, Stored, uint4, rounds, always, Team>>(args);
}

// Alike for all losses that leave bits.
using BitLoss = MarginLoss<AnyMarginPolicy>;

template <class Stored, int kLanes, int kHeld>
__global__ void __launch_bounds__(kTileThreads, 8)
    gradient_of_bits_in_tiles(const __grid_constant__ RegisterArgs args) {
    constexpr TileKernel kernel{KernelKind::kOneKept, kLanes, kHeld};
    constexpr int rounds = kHeld / Word<Stored>::count, always = kernel.always(rounds);
    using Team = LaneTeam<kLanes>;
    work_on_register_tiles<GradientOfBits<BitLoss, Stored, unsigned, rounds, always, Team, kernel.takes_ragged()>>(
        args);
}

template <class Stored, int kHeld, class Team>
__global__ void __launch_bounds__((kMultiReductionKernel<BitLoss, kHeld, Team>.most_threads(sizeof(Stored))))
    gradient_of_bits(const __grid_constant__ RegisterArgs args) {
    constexpr int rounds = kHeld / kVector<Stored>;
    constexpr int always = kMultiReductionKernel<BitLoss, kHeld, Team>.always(rounds);
    work_on_direct_rows<GradientOfBits<BitLoss, Stored, uint4, rounds, always, Team>>(args);
}

// For a dtype.
template <class Loss, class Stored>
struct LossFor {
    using type = Loss;
};
template <class Loss, class Stored>
    requires(sizeof(Stored) == 2 && requires { typename Loss::Coarse; })
struct LossFor<Loss, Stored> {
    using type = typename Loss::Coarse;
};

template <class Given, class Stored>
cudaError_t enqueue_multi_reduction_as(RegisterArgs& args, cudaStream_t stream) {
    using Loss = typename LossFor<Given, Stored>::type;
    constexpr KernelKind kind = kKeptBy<Loss>;
    const bool of_bits = args.is_saved && args.problem.bits;
    const auto launch_tile = [&]<TileKernel kernel>()
        requires(kernel.kind == kind)
    {
        if constexpr (RegisterTraits<Loss>::leaves_bits && kernel.lanes != 1)  // short rows leave none
            if (of_bits)
                return launch_tiles_resident(&gradient_of_bits_in_tiles<Stored, kernel.lanes, kernel.held>, args,
                                             stream);
        return launch_tiles_resident(&multi_reduction_in_register_tiles<Loss, Stored, kernel.lanes, kernel.held>, args,
                                     stream);
    };
    const auto launch_rows = [&]<DirectKernel kernel>()
        requires(kernel.kind == kind)
    {
        using Team = std::conditional_t<kernel.of_warps, WarpTeam, BlockTeam>;
        if constexpr (RegisterTraits<Loss>::leaves_bits)
            if (of_bits) return launch_rows_resident(&gradient_of_bits<Stored, kernel.held, Team>, args, stream);
        return launch_rows_resident(&multi_reduction_in_registers<Loss, Stored, kernel.held, Team>, args, stream,
                                    args.out.follows_weights);
    };
    const auto launch_tiles = [&] { return launch_planned<kTileKernels>(args.plan, launch_tile); };
    const auto launch_direct = [&] { return launch_planned<kDirectKernels>(args.plan, launch_rows); };
    if (!args.problem.bits) return launch_held(args, kind, launch_tiles, [] { return kDoesNotFit; }, launch_direct);
    int multiprocessors = 0;
    if (const cudaError_t error = find_multiprocessors(multiprocessors); error != cudaSuccess) return error;
    if (!(args.plan = plan_of_bits(args.problem, multiprocessors))) return kDoesNotFit;
    if (of_bits) args.plan.slot_bytes = 0;  // no row comes before it is its turn
    return args.plan.row_bytes > 0 ? launch_tiles() : launch_direct();
}

// Rows that registers can hold; kDoesNotFit if they cannot, or for other losses and parameters.
template <class Given>
cudaError_t enqueue_multi_reduction_in_registers(RegisterArgs& args, cudaStream_t stream) {
    cudaError_t error = kDoesNotFit;
    const auto enqueue = [&]<class Loss>() {
        with_stored<float>(args.problem.dtype,
                           [&]<class Stored>() { error = enqueue_multi_reduction_as<Loss, Stored>(args, stream); });
    };
    if constexpr (requires { Given::visit_usual(args.problem.params, enqueue); })
        Given::visit_usual(args.problem.params, enqueue);
    else if constexpr (RegisterTraits<Given>::is_held)
        enqueue.template operator()<Given>();
    return error;
}

}  // namespace fused_losses::cuda
