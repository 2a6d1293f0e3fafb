// Losses of several passes (core/multi_reduction_loss.h). A row is read once: until its gradient is written it stays
// with the threads that share it, as floats whatever its dtype, each with what the loss keeps of it: in registers where
// formulas are short, in shared memory where loops over registers would be as long once a number. Longer rows are read
// again in each pass. Forward with its gradient, or backward alone.
#pragma once

#include "cuda/kept_rows.cuh"
#include "losses/run_as.h"

namespace fused_losses::cuda {

// Where the numbers of a thread are.
enum class Kept { kNot, kShared, kRegisters };

// Losses whose rows stay in registers: those that know their parameters.
template <class Loss>
constexpr bool kIsShort = false;
template <bool kThreshold, bool kSquared>
constexpr bool kIsShort<MarginLoss<AnyMarginPolicy::Knowing<kThreshold, kSquared>>> = true;
template <class Rule, bool kOrdinary>
constexpr bool kIsShort<PowerLoss<Rule, kOrdinary>> = kOrdinary;
template <int kN>
constexpr bool kIsShort<BiTemperedOf<kN, true>> = true;
// Whether a class that is masked, with a logit of -inf, adds something to the sums.
template <class Loss>
constexpr bool kCountsMasked = false;
template <class Rule, bool kOrdinary>
constexpr bool kCountsMasked<PowerLoss<Rule, kOrdinary>> = true;

// Numbers that a loss keeps of each class, the last of them in the place of the logit: what is kept last is kept by the
// last pass that needs the logit.
template <class Loss, Kept kKept>
constexpr int kSlots = kKept == Kept::kNot ? 1 : Loss::num_kept;

template <class A, int n>
struct SharedNumbers {
    const Slots<A, n>& slots;

    template <int kUnroll, class Body>
    FL_DEVICE void each(int, int count, Body body) {
#pragma unroll kUnroll
        for (int k = 0; k < count; ++k) body(slots.of(k), k);
    }
};

template <class A, int n>
struct RegisterNumbers {
    static constexpr int kHeld = kMostKeptInRegisters / n, kChunk = 5;  // of which all or none are left out
    A numbers[kHeld][n];

    FL_DEVICE explicit RegisterNumbers(const Slots<A, n>&) {}

    // Those beyond the thread's are worked on along with them, up to a chunk's end. most: of a thread of the team.
    template <int, class Body>
    FL_DEVICE void each(int most, int, Body body) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
            if (k > 0 && k % kChunk == 0 && k >= most) break;
            body(numbers[k], k);
        }
    }
};

// The margin of a class. Rows in registers have the same for all.
template <bool kSame, class A>
FL_DEVICE A margin_of(const RowArgs<A>& args, int cls) {
    const RowProblem& p = args.problem;
    return !kSame && p.first_param ? as<A>(p.first_param)[cls * p.first_param_stride] : args.params[0];
}

// kIsTile: a class follows the other.
template <class Loss, class A, Kept kKept, bool kIsTile>
class PassRow {
    using State = typename Loss::template State<A>;
    static constexpr int kState = kStateSize<State, A>, n = kSlots<Loss, kKept>;
    static constexpr bool kKeeps = kKept != Kept::kNot, kIsPadded = kKept == Kept::kRegisters;
    using Numbers = std::conditional_t<kKept == Kept::kRegisters, RegisterNumbers<A, n>, SharedNumbers<A, n>>;

public:
    FL_DEVICE PassRow(const PlannedArgs<A>& a, const ClassesOfThread& c, void* memory)
        : args(a),
          p(a.problem),
          classes(c),
          slots{static_cast<A*>(memory) + threadIdx.x * a.plan.pitch},
          bias(bias_of(a)),
          share(written_share<A>(p)) {}

    // For all threads of the team. Those of rows that do not exist, or are ignored, have something to do for the
    // others' sake.
    template <class Team>
    FL_DEVICE void run(Team& team, const Row& row, bool exists, const RowPlace& place, LossSums& sums) const {
        const Target target = exists ? target_of(p, row) : Target{0, true};
        const bool reads = exists && !target.ignored;
        Numbers numbers{slots};
        OfThread mine{numbers, place, reads ? classes.count : 0, -1, A(0)};
        if (reads) {
            mine.target_logit = read_logit<A>(p.dtype, place, target.cls) + bias;
            mine.target_at = classes.place_of(target.cls);
        }
        if (kKeeps) read(mine, 0);
        State state{};
        A scale = A(0);
        if (args.is_saved) {
            if (reads) {
                state = saved_state(row.number);
                scale = scale_of<A>(p, row) * class_weight_of<A>(p, target);
            }
        } else {
            state = reduce(team, mine, target);
            const A weight = reads ? class_weight_of<A>(p, target) * sample_weight_of<A>(p, row) : A(0);
            if (team.leads && exists) record(row, reads, weight, state, sums);
            scale = weight * share;
        }
        // All have read the target's logit: in a tile, the gradient may be written in its place. Shuffles do not
        // promise that.
        if (args.is_saved || kIsTile) team.sync();
        if (p.grad && exists) write_gradient(mine, reads, state, scale);
    }

private:
    struct OfThread {
        Numbers& numbers;
        RowPlace place;
        int count, target_at;
        A target_logit;  // bias added
    };

    FL_DEVICE int held() const { return args.plan.held; }
    FL_DEVICE int class_at(int k) const { return classes.first + k * classes.step; }

    FL_DEVICE void read(const OfThread& mine, int begin) const {
        const int count = min(mine.count - begin, held()), own = mine.target_at - begin;
        if constexpr (kKept == Kept::kRegisters) {
            with_stored<A>(p.dtype, [&]<class Stored>() {
                const char* const from = mine.place.from + classes.first * mine.place.from_step;
                const std::uint64_t step = kIsTile ? sizeof(Stored) : args.plan.logits_step;
                mine.numbers.template each<1>(classes.most, count, [&](A* kept, int k) {
                    kept[n - 1] = k < count ? to_acc(*reinterpret_cast<const Stored*>(from + k * step))
                                            : -std::numeric_limits<A>::infinity();
                });
            });
            if (bias == A(0)) return;
            mine.numbers.template each<1>(classes.most, count, [&](A* kept, int k) {
                if (k == own) kept[n - 1] = mine.target_logit;
            });
        } else {
            read_into(slots, p.dtype, mine.place, classes, begin, count);
            if (static_cast<unsigned>(own) < static_cast<unsigned>(max(count, 0)))
                slots.of(own)[n - 1] = mine.target_logit;
        }
    }

    // body(numbers of the class, its number among the thread's) for `count` of them.
    template <class Body>
    FL_DEVICE void each_class(const OfThread& mine, Body body) const {
        for (int begin = 0; begin < mine.count; begin += held()) {
            if (!kKeeps) read(mine, begin);
            const int count = min(mine.count - begin, held());
            mine.numbers.template each<kUnroll>(classes.most, count, [&](A* kept, int k) { body(kept, begin + k); });
            if (kKeeps) break;
        }
    }
    static constexpr int kUnroll = Loss::needs_max ? 1 : 4;  // of short formulas

    template <class Team>
    FL_DEVICE State reduce(Team& team, const OfThread& mine, const Target& target) const {
        RowInputs<A> inputs{A(0), mine.target_logit, margin_of<kIsPadded>(args, target.cls), A(p.num_classes)};
        if constexpr (Loss::needs_max) {
            A top = -std::numeric_limits<A>::infinity();
            each_class(mine, [&](const A* kept, int) { top = Larger()(top, kept[n - 1]); });
            inputs.max = largest_of(team, top);
        }
        State state = Loss::begin(inputs, args.params);
        const int last = Loss::passes(p.params) - 1;
        for (int pass = 0; pass < last; ++pass) run_pass<false>(team, pass, mine, state, inputs);
        run_pass<true>(team, last, mine, state, inputs);
        return state;
    }

    template <bool last, class Team>
    FL_DEVICE void run_pass(Team& team, int pass, const OfThread& mine, State& state,
                            const RowInputs<A>& inputs) const {
        constexpr int count = last ? Loss::num_sums : Loss::num_early_sums;
        if constexpr (count > 0) {
            A sums[count] = {};
            each_class(mine, [&](A* kept, int number) {
                const auto term =
                    Loss::template map<last>(pass, state, kept[n - 1], margin_of<kIsPadded>(args, class_at(number)),
                                             number == mine.target_at, args.params, kKeeps ? kept : nullptr);
#pragma unroll
                for (int i = 0; i < count; ++i)
                    sums[i] += kIsPadded && kCountsMasked<Loss> && number >= mine.count ? A(0) : term.v[i];
            });
            team.reduce(sums, A(0), Plus());
            Sums<A, Loss::num_sums> all{};
#pragma unroll
            for (int i = 0; i < count; ++i) all.v[i] = sums[i];
            Loss::finalize(pass, state, all, inputs, args.params);
        }
    }

    FL_DEVICE State saved_state(std::int64_t row) const {
        A numbers[kState];
        for (int k = 0; k < kState; ++k) numbers[k] = as<A>(p.stats)[k * p.rows() + row];
        State state;
        std::memcpy(&state, numbers, sizeof(state));
        return state;
    }

    FL_DEVICE void record(const Row& row, bool counts, A weight, const State& state, LossSums& sums) const {
        A numbers[kState] = {}, value = A(0);
        if (counts) {
            std::memcpy(numbers, &state, sizeof(state));
            value = Loss::value(state);
            if (p.reduction == Reduction::kActiveMean && value <= A(0)) counts = false;  // NaN counts
        }
        sums.add({static_cast<double>(weight * value), static_cast<double>(counts ? weight : A(0))});
        if (args.keeps_rows) keep_row(p, row, weight * value, numbers);
    }

    FL_DEVICE void write_gradient(const OfThread& mine, bool reads, const State& state, A scale) const {
        for (int begin = 0; begin < classes.count; begin += held()) {
            const int count = min(classes.count - begin, held());
            if (!kKeeps) read(mine, begin);
            const auto put = [&](A* kept, int k) {
                const bool own = begin + k == mine.target_at;
                const A margin = margin_of<kIsPadded>(args, class_at(begin + k));
                kept[n - 1] = scale * (kKeeps && !args.is_saved
                                           ? Loss::gradient(state, kept, own, args.params)
                                           : gradient_at<Loss>(state, kept[n - 1], margin, own, args.params));
            };
            if (reads)
                mine.numbers.template each<kUnroll>(classes.most, count, put);
            else
                mine.numbers.template each<1>(classes.most, count, [](A* kept, int) { kept[n - 1] = A(0); });
            write(mine, begin, count);
            if (kKeeps) break;
        }
    }

    FL_DEVICE void write(const OfThread& mine, int begin, int count) const {
        if constexpr (kKept == Kept::kRegisters) {
            with_stored<A>(p.dtype, [&]<class Stored>() {
                char* const to = mine.place.to + classes.first * mine.place.to_step;
                const std::uint64_t step = kIsTile ? sizeof(Stored) : args.plan.grad_step;
                mine.numbers.template each<1>(classes.most, count, [&](const A* kept, int k) {
                    if (k < count) *reinterpret_cast<Stored*>(to + k * step) = to_stored<Stored>(kept[n - 1]);
                });
            });
        } else {
            write_from(slots, p.dtype, mine.place, classes, begin, count);
        }
    }

    const PlannedArgs<A>& args;
    const RowProblem& p;
    const ClassesOfThread classes;
    const Slots<A, n> slots;  // not of kRegisters
    const A bias, share;
};

template <class Loss, Kept kKept>
__global__ void __launch_bounds__(kTileThreads, kKept == Kept::kRegisters ? 5 : 6)
    passes_in_tiles(const __grid_constant__ RegisterArgs args) {
    work_on_tiles<PassRow<Loss, float, kKept, true>>(args);
}

template <class A, Kept kKept>
constexpr int kRowThreads = kKept != Kept::kNot && sizeof(A) == 4 ? kMostColumnThreads : kBlock;

template <class Loss, class A, Kept kKept>
__global__ void __launch_bounds__(kRowThreads<A, kKept>,
                                  sizeof(A) == 4 && Loss::num_kept < 3 && kKept != Kept::kRegisters ? 2 : 1)
    passes_of_rows(const __grid_constant__ PlannedArgs<A> args) {
    work_on_rows<A, PassRow<Loss, A, kKept, false>>(args);
}

template <class Loss, class A>
cudaError_t enqueue_any_rows(PlannedArgs<A>& args, cudaStream_t stream) {
    args.plan = plan_any_rows(args.problem, kSlots<Loss, Kept::kNot>);
    return launch_rows_resident(&passes_of_rows<Loss, A, Kept::kNot>, args, stream);
}

// Rows that stay with their threads; kDoesNotFit if there is no room for them.
template <class Loss, Kept kKept>
cudaError_t enqueue_kept(RegisterArgs& args, cudaStream_t stream) {
    // Of rows that lie anyhow, pairs of numbers take too many registers beside the addresses.
    constexpr Kept of_rows = Loss::num_kept == 1 ? kKept : Kept::kShared;
    constexpr auto numbers = [](Kept kept) { return PassNumbers{Loss::num_kept, kept == Kept::kRegisters}; };
    return launch_kept<RegisterArgs>(
        {&passes_in_tiles<Loss, kKept>, numbers(kKept), &passes_of_rows<Loss, float, of_rows>, numbers(of_rows)}, args,
        stream);
}

template <class Given>
cudaError_t enqueue_passes_of(const RowProblem& given, const LossOutput& out, bool is_saved, cudaStream_t stream) {
    using Loss = typename RunAs<Given>::type;
    RowProblem p = given;
    RunAs<Given>::convert(p.params);
    if (p.dtype == Dtype::kFloat64) {
        PlannedArgs<double> args(p, out);
        args.is_saved = is_saved;
        return enqueue_any_rows<Loss>(args, stream);
    }
    RegisterArgs args(p, out);
    args.is_saved = is_saved;
    cudaError_t error = kDoesNotFit;
    visit_variant<Loss>(p.params, [&]<class Variant>() {
        if constexpr (kIsShort<Variant>)
            if (!p.first_param) {
                error = enqueue_kept<Variant, Kept::kRegisters>(args, stream);
                return;
            }
        error = enqueue_kept<Loss, Kept::kShared>(args, stream);
    });
    return error == kDoesNotFit ? enqueue_any_rows<Loss>(args, stream) : error;
}

// In tempered_passes.cu, which is compiled at the same time as the others.
extern template cudaError_t enqueue_passes_of<BiTempered>(const RowProblem&, const LossOutput&, bool, cudaStream_t);

}  // namespace fused_losses::cuda
