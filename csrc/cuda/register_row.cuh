// A row of a softmax loss in the registers of the threads that share it: read once, exponentials taken once, then its
// gradient written. What costs instructions per logit is left out: there is no test for the target's class, which is
// put right afterwards, and none for ignored rows, which are not read.
#pragma once

#include "cuda/packed.cuh"
#include "cuda/register_launch.cuh"
#include "cuda/row_end.cuh"
#include "cuda/row_team.cuh"

namespace fused_losses::cuda {

// In one register.
struct PackedTarget {
    static constexpr int kIgnored = -2;
    int cls;

    FL_DEVICE PackedTarget(const RegisterArgs& args, std::int64_t number, bool exists) : cls(kIgnored) {
        if (!exists) return;
        const Target target = target_of(args.problem, {number, 0, number});
        if (!target.ignored) cls = target.cls;
    }
    FL_DEVICE Target unpack() const { return {cls, cls == kIgnored}; }
};

// Place: where a thread finds its part of a row, as whole accesses `step()` apart.
//     from(), to()         the first; the k-th is there if k * step() < left
//     first()              class of the first number
//     extra()              class of a number beside the accesses, -1 if there is none
//     logits(), grad()     the row, from its first class on
//     exists               whether there is a row, not just something to do for the others' sake
//     owns(cls)            whether this thread writes the gradient of the target's class
// What it takes to find them is worked out when it is needed: registers are what is scarce.
template <class Stored, bool kFactors, class Access, int kRounds, class Team>
class RegisterRow {
    static constexpr int kWords = sizeof(Access) / 4, kCount = Word<Stored>::count, kNumbers = kWords * kCount;
    static constexpr float kLowest = -std::numeric_limits<float>::infinity();

public:
    // For all threads of the block.
    FL_DEVICE RegisterRow(const RegisterArgs& a, LossSums& sums) : args(a), p(a.problem), end(a, sums) {
        if (threadIdx.x == 0) keep({bias_of(a), written_share<float>(p)});
        __syncthreads();
    }

    // For all threads of the team.
    template <class Place>
    FL_DEVICE void run(Team& team, std::int64_t number, PackedTarget packed, const Place& place) const {
        const Target target = packed.unpack();
        const Row row{number, 0, number};
        const bool reads = place.exists && !target.ignored, has_target = reads && target.cls >= 0;
        const bool is_apart = of_block()->bias != 0.0f && has_target;
        unsigned w[kRounds * kWords];
        read(place, reads ? place.left : 0, w);
        float extra = kLowest;
        if (args.plan.is_ragged && reads && place.extra() >= 0) extra = to_acc(place.logits()[place.extra()]);
        const float target_logit = has_target ? to_acc(place.logits()[target.cls]) + of_block()->bias : 0.0f;
        if (is_apart) set_apart(w, extra, target.cls, place);

        float pivot;
        if (args.is_saved) {
            pivot = reads ? as<float>(p.stats)[number] : 0.0f;
        } else {
            pivot = largest_of(team, std::fmax(largest(w), extra));
            if (is_apart) pivot = std::fmax(pivot, target_logit);
            if (pivot == kLowest) pivot = 0.0f;
        }
        const Exponential<Stored> exponential(pivot);
        float e[kRounds * kNumbers];
        SoftmaxState<float> state{pivot, 0.0f, 0.0f, 0.0f};
        const ClassFactorReader<float> factor(p, args, row);
        const int left = reads ? place.left : 0;
        if (!kFactors && has_ones() && !args.is_saved) {
            take_exponentials<true>(exponential, w, e, state, factor, left, is_apart, target.cls, place);
            if (is_apart) *centred() = centred_without(exponential, w, left, target.cls, place);
        } else {
            take_exponentials<false>(exponential, w, e, state, factor, left, is_apart, target.cls, place);
        }
        const float extra_e = exponential(extra), target_e = exponential(target_logit);
        Coefficients<float> coefficients{};
        if (args.is_saved) {
            if (reads) coefficients = saved_coefficients<float>(p, row);
            team.sync();  // the target's logit has been read: the gradient may be written in its place
        } else {
            state.sum = sum_of(team, state.sum + extra_e);
            if (is_apart) state.sum += target_e;
            const bool counts_extra =
                args.plan.is_ragged && reads && place.extra() >= 0 && !(is_apart && place.extra() == target.cls);
            if constexpr (kFactors) {
                if (counts_extra) state.add(exponential.distance(extra), factor(place.extra()), 0.0f);
                float sums[] = {state.centred, state.sum_u};
                team.reduce(sums, 0.0f, Plus());
                state.centred = sums[0], state.sum_u = sums[1];
                if (is_apart) state.add(exponential.distance(target_logit), factor(target.cls), 0.0f);
            } else if (has_ones()) {
                const float all = sum_of(team, *centred() + (counts_extra ? exponential.distance(extra) : 0.0f));
                *centred() = all + (is_apart ? exponential.distance(target_logit) : 0.0f);
            }
            if (place.exists && target.ignored) end.ignore(row, team.leads);
            if (!kFactors && has_ones()) state.centred = *centred(), state.sum_u = static_cast<float>(p.num_classes);
            if (reads)
                coefficients = end.finish(row, target, target_logit, exponential.distance(target_logit),
                                          exponential.log(state.sum), state, team.leads);
            coefficients.scale(of_block()->share);
        }
        if (!p.grad) return;
        write(place, e, coefficients, factor);
        if (args.plan.is_ragged && place.exists && place.extra() >= 0)
            place.grad()[place.extra()] =
                to_stored<Stored>(coefficients.of_exponential(extra_e, kFactors ? factor(place.extra()) : 1.0f, false));
        team.sync();
        if (has_target && place.owns(target.cls))
            place.grad()[target.cls] =
                to_stored<Stored>(coefficients.of_exponential(target_e, kFactors ? factor(target.cls) : 1.0f, true));
    }

private:
    // What every row needs, where it takes no registers: to be read when it is needed.
    struct OfBlock {
        float bias, share;
    };
    static FL_DEVICE volatile OfBlock* of_block() {
        __shared__ OfBlock shared;
        return &shared;
    }
    static FL_DEVICE void keep(OfBlock x) {
        of_block()->bias = x.bias;
        of_block()->share = x.share;
    }

    template <class Body>
    static FL_DEVICE void each_round(Body body) {
#pragma unroll
        for (int k = 0; k < kRounds; ++k) body(k);
    }

    FL_DEVICE float largest(const unsigned* w) const {
        unsigned top = Word<Stored>::lowest;
        each_round([&](int k) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) top = Word<Stored>::larger(top, w[k * kWords + i]);
        });
        float z[kCount];
        Word<Stored>::widen(top, z);
        return kCount == 1 ? z[0] : std::fmax(z[0], z[kCount - 1]);
    }

    template <class Place>
    FL_DEVICE void read(const Place& place, int left, unsigned* w) const {
        const Access* from = place.from();
        each_round([&](int k) {
            unsigned words[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) words[i] = Word<Stored>::lowest;
            Access x;
            std::memcpy(&x, words, sizeof x);
            if (left > 0) x = *from;
            from += place.step();
            left -= place.step();
            std::memcpy(w + k * kWords, &x, sizeof x);
        });
    }

    // With a bias, the target's logit is not that of the row: it counts as -inf here, for itself after the sums.
    template <class Place>
    FL_DEVICE void set_apart(unsigned* w, float& extra, int target, const Place& place) const {
        if (target == place.extra()) extra = kLowest;
        each_round([&](int k) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const int at = target - (place.first() + (k * place.step() * kWords + i) * kCount);
                if (static_cast<unsigned>(at) >= kCount) continue;
                const unsigned own = kCount == 1 ? 0xffffffffu : 0xffffu << 16 * at;
                unsigned& word = w[k * kWords + i];
                word = (word & ~own) | (Word<Stored>::lowest & own);
            }
        });
    }

    // Without kFactors u_j is 1, and gamma of that, or neither is there.
    FL_DEVICE bool has_ones() const { return p.class_factors != ClassFactors::kNone; }

    // What is summed with u_j = 1, where it takes no register of losses that do not ask for it.
    static FL_DEVICE volatile float* centred() {
        __shared__ float of_thread[kMostThreads];
        return of_thread + threadIdx.x;
    }

    // The sum of distances but for the target's; kOnes leaves what is to be done with it to this.
    template <class Place>
    FL_DEVICE float centred_without(const Exponential<Stored>& exponential, const unsigned* w, int left, int target,
                                    const Place& place) const {
        float sum = 0.0f;
        each_round([&](int k) {
            if (left <= k * place.step()) return;
            float z[kNumbers];
#pragma unroll
            for (int i = 0; i < kWords; ++i) Word<Stored>::widen(w[k * kWords + i], z + i * kCount);
#pragma unroll
            for (int i = 0; i < kNumbers; ++i)
                if (place.first() + k * place.step() * kNumbers + i != target) sum += exponential.distance(z[i]);
        });
        return sum;
    }

    template <bool kOnes, class Place>
    FL_DEVICE void take_exponentials(const Exponential<Stored>& exponential, const unsigned* w, float* e,
                                     SoftmaxState<float>& state, const ClassFactorReader<float>& factor, int left,
                                     bool is_apart, int target, const Place& place) const {
        float odd = 0.0f;  // every other exponential: two sums that need not wait for each other
        float arguments = 0.0f;
        each_round([&](int k) {
            float z[kNumbers];
#pragma unroll
            for (int i = 0; i < kWords; ++i) Word<Stored>::widen(w[k * kWords + i], z + i * kCount);
#pragma unroll
            for (int i = 0; i < kNumbers; ++i) {
                float& x = e[k * kNumbers + i];
                x = exponential(z[i]);
                (i % 2 == 1 || (kNumbers == 1 && k % 2 == 1) ? odd : state.sum) += x;
            }
            if constexpr (kOnes)
                if (left > k * place.step())
#pragma unroll
                    for (int i = 0; i < kNumbers; ++i) arguments += exponential.argument(z[i]);
            if constexpr (kFactors) {
                if (args.is_saved || left <= k * place.step()) return;
                const int cls = place.first() + k * place.step() * kNumbers;
#pragma unroll
                for (int i = 0; i < kNumbers; ++i)
                    if (!is_apart || cls + i != target) state.add(exponential.distance(z[i]), factor(cls + i), 0.0f);
            }
        });
        state.sum += odd;
        if constexpr (kOnes) *centred() = arguments * Exponential<Stored>::kUnit;
    }

    template <class Place>
    FL_DEVICE void write(const Place& place, const float* e, const Coefficients<float>& c,
                         const ClassFactorReader<float>& factor) const {
        Access* to = place.to();
        int left = place.exists ? place.left : 0;
        each_round([&](int k) {
            unsigned words[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                float g[kCount];
#pragma unroll
                for (int h = 0; h < kCount; ++h) {
                    const int at = i * kCount + h;
                    g[h] = c.alpha * e[k * kNumbers + at] + (kFactors ? 0.0f : c.gamma);
                    if constexpr (kFactors)  // beyond the row there is no u_j
                        if (left > 0) g[h] += c.gamma * factor(place.first() + k * place.step() * kNumbers + at);
                }
                words[i] = Word<Stored>::narrow(g);
            }
            Access x;
            std::memcpy(&x, words, sizeof x);
            if (left > 0) {
                if constexpr (kWords == 1)
                    *to = x;
                else
                    store_at_once(to, x);
            }
            to += place.step();
            left -= place.step();
        });
    }

    const RegisterArgs& args;
    const RowProblem& p;
    mutable RowEnd<float> end;
};

}  // namespace fused_losses::cuda
