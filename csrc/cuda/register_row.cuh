// A row of a softmax loss in the registers of the threads that share it: read once, exponentials taken once, then its
// gradient written. What costs instructions per logit is left out: there is no test for the target's class, which is
// put right afterwards, and none for ignored rows, which are not read. What costs instructions per row is asked for
// together: few calls have weights or statistics.
#pragma once

#include "cuda/packed.cuh"
#include "cuda/register_launch.cuh"
#include "cuda/row_end.cuh"
#include "cuda/row_team.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {

// In one register. A row that does not exist is an ignored one, of which nothing is kept.
template <Factors kFactors>
struct PackedTarget {
    static constexpr int kIgnored = -2;
    int cls;

    FL_DEVICE PackedTarget(const RegisterArgs& args, int number, bool exists) : cls(kIgnored) {
        if (!exists) return;
        if (kFactors == Factors::kRead && !args.problem.target) {
            cls = -1;
            return;
        }
        const auto offset = std::uint64_t(args.plan.target_step) * static_cast<unsigned>(number);
        cls = target_or(kIgnored, args.problem, static_cast<std::int64_t>(offset));
    }
    FL_DEVICE bool is_ignored() const { return cls == kIgnored; }
};

// Place: where a thread finds its part of a row, as whole accesses `step()` apart.
//     from(), to()         the first; the k-th is there if k * step() < left
//     first()              class of the first number
//     extra()              class of a number beside the accesses, -1 if there is none
//     logits(), grad()     the row, from its first class on
//     kIsMixed             whether the warp has other rows as well: those that are ignored, or do not exist, are then
//                          worked on along with the others, but read numbers that are finite; else run() is not called
//                          for them
//     exists               whether there is a row
//     owns(cls)            whether this thread writes the gradient of the target's class
// What it takes to find them is worked out when it is needed: registers are what is scarce. Of the kRounds accesses
// that a thread has room for, every thread has the first kAlways.
template <class Stored, Factors kFactors, class Access, int kRounds, int kAlways, class Team>
class RegisterRow {
    static constexpr bool kLooks = kFactors == Factors::kOnesAndStatistics;
    static constexpr bool kReadsU = kFactors == Factors::kRead, kOnes = kFactors == Factors::kOnes || kLooks;
    static constexpr int kWords = sizeof(Access) / 4, kCount = Word<Stored>::count, kNumbers = kWords * kCount;
    static constexpr float kLowest = -std::numeric_limits<float>::infinity();

public:
    FL_DEVICE RegisterRow(const RegisterArgs& a, LossSums& sums)
        : args(a), p(a.problem), end(a, sums), bias(bias_of(a)), share(written_share<float>(p)) {}

    // Whether the logits of a row are read: those of an ignored one for its statistics alone.
    static FL_DEVICE bool is_read(PackedTarget<kFactors> target, bool exists) {
        return kLooks ? exists : !target.is_ignored();
    }

    // What is kept of an ignored row. For all threads of the team.
    FL_DEVICE void ignore(const Team& team, int number) const {
        if (!is_saved()) end.ignore({number, 0, number}, team.leads);
    }

    // The gradient of a row that the team leaves out.
    template <class Place>
    FL_DEVICE void write_zeros(const Place& place) const {
        if (!p.grad) return;
        const unsigned zeros[kWords] = {};
        for (int k = 0; k * place.step() < place.left; ++k) place.to()[k * place.step()] = join(zeros);
        if (place.extra() >= 0) place.grad()[place.extra()] = to_stored<Stored>(0.0f);
    }

    // For all threads of the team.
    template <class Place>
    FL_DEVICE void run(Team& team, int number, PackedTarget<kFactors> packed, const Place& place) const {
        const bool reads = (!Place::kIsMixed && !kLooks) || !packed.is_ignored();
        const bool has_target = kReadsU ? packed.cls >= 0 : reads;
        const Target target{packed.cls, !reads};
        const Row row{number, 0, number};
        // A bias, and the margin, ask for the largest of the other logits.
        const bool is_apart = (kLooks || bias != 0.0f) && has_target;
        unsigned w[kRounds * kWords];
        read(place, w);
        const int extra_class = place.extra();
        float extra = kLowest;
        if (is_read(packed, place.exists) && extra_class >= 0) extra = to_acc(place.logits()[extra_class]);
        const float target_logit = has_target ? to_acc(place.logits()[target.cls]) + bias : 0.0f;
        if (is_apart) set_apart(w, extra, target.cls, place);

        float pivot, others = 0.0f;
        if (is_saved()) {
            pivot = reads ? as<float>(p.stats)[number] : 0.0f;
        } else {
            others = pivot = largest_of(team, std::fmax(largest(w), extra));
            if (is_apart) pivot = std::fmax(pivot, target_logit);
            if (pivot == kLowest || !is_read(packed, place.exists)) pivot = 0.0f;
        }
        const Exponential<Stored> exponential(pivot);
        float e[kRounds * kNumbers];
        SoftmaxState<float> state{pivot, 0.0f, 0.0f, 0.0f};
        const ClassFactorReader<float> factor(p, args, row);
        take_exponentials(exponential, w, e, state);
        if constexpr (kFactors != Factors::kNone)
            if (reads && !is_saved() && (!kLooks || p.class_factors != ClassFactors::kNone))
                add_factors(exponential, w, state, factor, is_apart ? target.cls : -1, place);
        float extra_e = exponential(extra);
        const float target_e = exponential(target_logit);
        Coefficients<float> coefficients{};
        if (is_saved()) {
            if (reads) coefficients = saved_coefficients<float>(p, row);
        } else {
            state.sum = sum_of(team, state.sum + extra_e);
            if (is_apart) state.sum += target_e;
            if constexpr (kLooks) {
                const RowSummary<float, int> all = summary(team, place, exponential, w, e, extra, extra_e, others,
                                                           state.sum, is_apart ? target.cls : -1, target_logit);
                if (team.leads && place.exists) write_statistics(number, target, place, exponential, target_logit, all);
                team.sync();  // before the gradient takes the place of the logits
                if (!reads) forget(e, extra_e);
            }
            if constexpr (kFactors != Factors::kNone) {
                if (reads && extra_class >= 0 && !(is_apart && extra_class == target.cls))
                    state.add(exponential.distance(extra), u_of(factor, extra_class), 0.0f);
                float sums[] = {state.centred, state.sum_u};
                team.reduce(sums, 0.0f, Plus());
                state.centred = sums[0], state.sum_u = sums[1];
                if (is_apart) state.add(exponential.distance(target_logit), u_of(factor, target.cls), 0.0f);
            }
            if (reads) {
                coefficients =
                    end.template finish<kFactors>(row, target, target_logit, exponential.distance(target_logit),
                                                  target_e, exponential.log(state.sum), state, team.leads);
                coefficients.scale(share);
            } else if (place.exists) {
                ignore(team, number);
            }
        }
        if (!p.grad) return;
        // All have read the target's logit: the gradient may be written in its place. Shuffles do not promise that.
        if (Place::kIsMixed || is_saved()) team.sync();
        write(place, reads, e, coefficients, factor);
        if (extra_class >= 0) {
            const float g = gradient_of(coefficients, extra_e, reads ? u_of(factor, extra_class) : 0.0f);
            place.grad()[extra_class] = to_stored<Stored>(g);
        }
        team.sync();
        if (has_target && place.owns(target.cls))
            place.grad()[target.cls] = to_stored<Stored>(coefficients.target_grad);
    }

private:
    template <class Body>
    static FL_DEVICE void each_round(Body body) {
#pragma unroll
        for (int k = 0; k < kRounds; ++k) body(k);
    }
    template <class Place>
    static FL_DEVICE bool has_round(const Place& place, int k) {
        return k < kAlways || place.left > k * place.step();
    }
    static FL_DEVICE Access join(const unsigned* words) {
        Access x;
        std::memcpy(&x, words, sizeof x);
        return x;
    }
    // Kernels that sum no u_j, or make statistics, are for forward alone.
    FL_DEVICE bool is_saved() const { return kFactors != Factors::kNone && !kLooks && args.is_saved; }
    // Of a class that is not the target.
    static FL_DEVICE float gradient_of(const Coefficients<float>& c, float exponential, float u) {
        const float g = c.alpha * exponential;
        return kFactors == Factors::kNone ? g : g + c.gamma * u;
    }
    static FL_DEVICE float u_of(const ClassFactorReader<float>& factor, int cls) {
        return kReadsU ? factor(cls) : 1.0f;
    }

    FL_DEVICE float largest(const unsigned* w) const {
        unsigned top = w[0];
#pragma unroll
        for (int i = 1; i < kRounds * kWords; ++i) top = Word<Stored>::larger(top, w[i]);
        float z[kCount];
        Word<Stored>::widen(top, z);
        return kCount == 1 ? z[0] : std::fmax(z[0], z[kCount - 1]);
    }

    template <class Place>
    FL_DEVICE void read(const Place& place, unsigned* w) const {
        const Access* const from = place.from();
        each_round([&](int k) {
            unsigned lowest[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) lowest[i] = Word<Stored>::lowest;
            const Access x = has_round(place, k) ? from[k * place.step()] : join(lowest);
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

    FL_DEVICE void take_exponentials(const Exponential<Stored>& exponential, const unsigned* w, float* e,
                                     SoftmaxState<float>& state) const {
        float sums[2];  // of every other one: they need not wait for each other
#pragma unroll
        for (int i = 0; i < kRounds * kWords; ++i) {
            Word<Stored>::widen(w[i], e + i * kCount);
#pragma unroll
            for (int at = i * kCount; at < (i + 1) * kCount; ++at) {
                e[at] = exponential(e[at]);
                sums[at % 2] = at < 2 ? e[at] : sums[at % 2] + e[at];
            }
        }
        state.sum = kRounds * kNumbers > 1 ? sums[0] + sums[1] : sums[0];
    }

    // The classes' factors and distances but for those of the class apart.
    template <class Place>
    FL_DEVICE void add_factors(const Exponential<Stored>& exponential, const unsigned* w, SoftmaxState<float>& state,
                               const ClassFactorReader<float>& factor, int apart, const Place& place) const {
        float arguments = 0.0f;
        each_round([&](int k) {
            if (!has_round(place, k)) return;
            const int cls = place.first() + k * place.step() * kNumbers;
            float z[kNumbers];
#pragma unroll
            for (int i = 0; i < kWords; ++i) Word<Stored>::widen(w[k * kWords + i], z + i * kCount);
            if (kOnes && apart < 0) {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i) arguments += exponential.argument(z[i]);
                state.sum_u += kNumbers;
            } else {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i)
                    if (cls + i != apart) state.add(exponential.distance(z[i]), u_of(factor, cls + i), 0.0f);
            }
        });
        state.centred += arguments * Exponential<Stored>::kUnit;
    }

    template <class Place>
    FL_DEVICE void write(const Place& place, bool reads, const float* e, const Coefficients<float>& c,
                         const ClassFactorReader<float>& factor) const {
        Access* const to = place.to();
        each_round([&](int k) {
            unsigned words[kWords];
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                float g[kCount];
#pragma unroll
                for (int h = 0; h < kCount; ++h) {
                    const int at = i * kCount + h;
                    float u = 1.0f;
                    if (kReadsU && reads && has_round(place, k))  // beyond the row there is none
                        u = factor(place.first() + k * place.step() * kNumbers + at);
                    g[h] = gradient_of(c, e[k * kNumbers + at], u);
                }
                words[i] = Word<Stored>::narrow(g);
            }
            if (!has_round(place, k)) return;
            if constexpr (kWords == 1)
                to[k * place.step()] = join(words);
            else
                store_at_once(to + k * place.step(), join(words));
        });
    }

    // What RowSummary says of the row, with the largest of all logits but the target's as second; relative to the
    // exponential's pivot. `target` is apart, -1 in an ignored row, which needs none.
    template <class Place>
    FL_DEVICE RowSummary<float, int> summary(Team& team, const Place& place, const Exponential<Stored>& exponential,
                                             const unsigned* w, const float* e, float extra, float extra_e,
                                             float others, float sum, int target, float target_logit) const {
        constexpr float infinity = std::numeric_limits<float>::infinity();
        const float top = target >= 0 ? std::fmax(others, target_logit) : others;
        float weighted = extra_e * distance_of(exponential, extra);
        int first = kRounds * kNumbers;  // of the thread's numbers that are the largest
#pragma unroll
        for (int i = kRounds * kWords - 1; i >= 0; --i) {
            float z[kCount];
            Word<Stored>::widen(w[i], z);
#pragma unroll
            for (int h = kCount - 1; h >= 0; --h) {
                weighted += e[i * kCount + h] * distance_of(exponential, z[h]);
                if (z[h] == top) first = i * kCount + h;
            }
        }
        const int round = first / kNumbers;
        const int own = place.first() + round * place.step() * kNumbers + first % kNumbers;
        float lowest[] = {first < kRounds * kNumbers ? static_cast<float>(own) : infinity};
        if (extra == top && place.extra() >= 0) lowest[0] = std::fmin(lowest[0], static_cast<float>(place.extra()));
        team.reduce(lowest, infinity, Smaller());
        weighted = sum_of(team, weighted);
        if (target >= 0) {
            weighted += exponential(target_logit) * distance_of(exponential, target_logit);
            if (target_logit == top) lowest[0] = std::fmin(lowest[0], static_cast<float>(target));
        }
        // All masked, or NaN: numbers beyond the row are as large.
        const int index = top == kLowest || lowest[0] == infinity ? 0 : static_cast<int>(lowest[0]);
        return {top, others, index, sum, weighted};
    }

    // Finite where the exponential is 0.
    static FL_DEVICE float distance_of(const Exponential<Stored>& exponential, float z) {
        return std::fmax(exponential.distance(z), -1e4f);
    }

    template <class Place>
    FL_DEVICE void write_statistics(int number, const Target& target, const Place& place,
                                    const Exponential<Stored>& exponential, float target_logit,
                                    const RowSummary<float, int>& all) const {
        const float log_p = exponential.distance(target_logit) - exponential.log(all.sum);
        RowStatisticsOf<float> found =
            row_statistics_of(log_p, exponential(all.top), all.top, target_logit - all.second, all.sum, all.weighted);
        write_row_statistics(p, number, target, all.sum, all.index, found,
                             [&](int cls) { return to_acc(place.logits()[cls]); });
    }

    // The exponentials of an ignored row may be infinite or NaN.
    static FL_DEVICE void forget(float* e, float& extra_e) {
#pragma unroll
        for (int i = 0; i < kRounds * kNumbers; ++i) e[i] = 0.0f;
        extra_e = 0.0f;
    }

    const RegisterArgs& args;
    const RowProblem& p;
    mutable RowEnd<float> end;
    const float bias, share;
};

}  // namespace fused_losses::cuda
