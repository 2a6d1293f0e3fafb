// Where backward makes the gradient, and a bit per class says all that it needs of the logits
// (core/multi_reduction_loss.h), forward leaves these bits: the logits are read once.
#pragma once

#include "cuda/register_words.cuh"

namespace fused_losses::cuda {

template <class Team>
FL_DEVICE int threads_of_row(const Team& team) {
    if constexpr (requires { team.lanes; })
        return team.lanes;
    else
        return team.threads * team.num_blocks();
}
template <class Team>
FL_DEVICE int thread_in_row(const Team& team) {
    if constexpr (requires { team.lanes; })
        return team.lane;
    else
        return team.block_rank() * team.threads + team.lane;
}

// Of a thread's numbers of a row, in the order in which it holds them, and of the one that it may have beside these.
// kHeld: how many it has room for.
template <int kHeld>
class RowBits {
    static_assert(kHeld <= 32);

public:
    template <class Team>
    FL_DEVICE RowBits(const RegisterArgs& args, const Team& team, int number)
        : words(args.plan.words_of_bits()),
          at(static_cast<unsigned*>(args.problem.bits) +
             (std::int64_t(number) * threads_of_row(team) + thread_in_row(team)) * words) {}

    // is_set(i): of its i-th number.
    template <class IsSet>
    FL_DEVICE void write(IsSet is_set, bool beside) const {
        unsigned word = 0;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) word |= unsigned(is_set(i)) << i;
        if (kHeld < 32) word |= unsigned(beside) << kHeld % 32;
        at[0] = word;
        if (kHeld == 32 && words > 1) at[1] = beside;
    }

    FL_DEVICE unsigned read() const { return at[0]; }
    FL_DEVICE bool read_beside(unsigned word) const { return kHeld < 32 ? word >> kHeld % 32 & 1 : at[1]; }

private:
    const int words;
    unsigned* const at;
};

// A Worker (register_words.cuh).
template <class Loss, class S, class Access, int kNumRounds, int kAlways, class T, bool kMayBeRagged = true>
class GradientOfBits {
    using State = typename Loss::template State<float>;

public:
    using Stored = S;
    using Team = T;
    using Packed = PackedTarget<KernelKind::kNoFactors>;
    using Words = RegisterWords<S, Access, kNumRounds, kAlways>;
    static constexpr int kRounds = kNumRounds;
    static constexpr bool kRagged = kMayBeRagged, kReadsRows = false, kMayLeaveStatistics = false;

    FL_DEVICE GradientOfBits(const RegisterArgs& a, LossSums&) : args(a), p(a.problem) {}

    static FL_DEVICE bool is_read(const Packed& target, bool) { return !target.is_ignored(); }
    FL_DEVICE void ignore(const Team&, int) const {}

    template <class Place>
    FL_DEVICE void write_zeros(const Place& place) const {
        Words::write_zeros(place);
    }

    template <class Place>
    FL_DEVICE void run(Team& team, int number, const Packed& packed, const Place& place) const {
        const bool reads = !Place::kIsMixed || !packed.is_ignored();
        const RowBits<Words::kHeld> bits(args, team, number);
        State state{};
        unsigned word = 0;
        if (reads) {
            const Row row = row_of_number(number);
            word = bits.read();
            state = saved_state<State, float>(p, number);
            Loss::scale(state, scale_of<float>(p, row) * class_weight_of<float>(p, {packed.cls, false}));
        }
        Words::write(place, [&](int i, bool) { return Loss::gradient_of_bit(state, (word >> i & 1) != 0, false); });
        if (const int cls = place.extra(); cls >= 0)
            place.grad()[cls] = to_stored<Stored>(Loss::gradient_of_bit(state, reads && bits.read_beside(word), false));
        team.sync();
        if (reads && place.owns(packed.cls))
            place.grad()[packed.cls] = to_stored<Stored>(Loss::gradient_of_bit(state, false, true));
    }

private:
    const RegisterArgs& args;
    const RowProblem& p;
};

}  // namespace fused_losses::cuda
