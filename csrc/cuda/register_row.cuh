// A row of a softmax loss in the registers of the threads that share it: read once, exponentials taken once, then its
// gradient written. What costs instructions per logit is left out: there is no test for the target's class, which is
// put right afterwards, and none for ignored rows, which are not read. What costs instructions per row is asked for
// together: few calls have weights or statistics.
#pragma once

#include "cuda/register_words.cuh"
#include "cuda/row_end.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {

template <class S, KernelKind kKind, class Access, int kNumRounds, int kAlways, class T>
class RegisterRow {
    static constexpr bool kWithStatistics = kKind == KernelKind::kStatistics;
    static constexpr bool kReadsU = kKind == KernelKind::kReadFactors,
                          kOnes = kKind == KernelKind::kUnitFactors || kWithStatistics;

public:
    using Words = RegisterWords<S, Access, kNumRounds, kAlways>;

private:
    static constexpr int kCount = Words::kCount, kNumbers = Words::kNumbers, kHeld = Words::kHeld;
    static constexpr float kLowest = Words::kLowest;

public:
    using Stored = S;
    using Team = T;
    using Packed = PackedTarget<kKind>;
    static constexpr int kRounds = kNumRounds;
    static constexpr bool kRagged = true, kReadsRows = true, kMayLeaveStatistics = false;

    FL_DEVICE RegisterRow(const RegisterArgs& a, LossSums& sums)
        : args(a), p(a.problem), end(a, sums), bias(bias_of(a)) {}

    // Whether the logits of a row are read: those of an ignored one for its statistics alone.
    static FL_DEVICE bool is_read(const Packed& target, bool exists) {
        return kWithStatistics ? exists : !target.is_ignored();
    }

    // What is kept of an ignored row. For all threads of the team.
    FL_DEVICE void ignore(const Team& team, int number) const {
        if (!is_saved()) end.ignore(row_of_number(number), team.leads);
    }

    // The gradient of a row that the team leaves out.
    template <class Place>
    FL_DEVICE void write_zeros(const Place& place) const {
        if (p.grad) Words::write_zeros(place);
    }

    // For all threads of the team.
    template <class Place>
    FL_DEVICE void run(Team& team, int number, const Packed& packed, const Place& place) const {
        OfRow of = look_at(number, packed, place);
        OfThread mine;
        read(of, place, mine);
        float others = 0.0f;  // the largest logit but the one that is apart
        const float pivot = is_saved() ? saved_pivot(of) : find_pivot(team, of, mine, others);
        Exponential<Stored> exponential(pivot);
        SoftmaxState<float> state{pivot, 0.0f, 0.0f, 0.0f};
        float weighted = 0.0f;
        take_exponentials(exponential, mine, state, weighted);
        if (!is_saved()) sum_up(team, of, others, exponential, mine, state, weighted);
        if constexpr (kKind != KernelKind::kNoFactors)
            if (of.counts && sums_u()) add_factors(exponential, mine, of.apart(), place, state);
        Coefficients<float> coefficients{};
        if (is_saved()) {
            if (of.counts) coefficients = saved_coefficients<float>(p, of.row);
        } else {
            const float target_e = exponential(of.target_logit);
            if (of.is_apart) state.sum += target_e;
            if constexpr (kWithStatistics)
                leave_statistics(team, of, place, exponential, {0.0f, others, 0, state.sum, weighted}, mine);
            if (sums_u()) sum_factors(team, of, exponential, mine, state);
            coefficients = finish(team, of, place, exponential, target_e, state, mine);
        }
        if (!args.writes_gradient) return;
        write_gradient(team, place, coefficients, mine);
        if (of.has_target && place.owns(of.target.cls))
            place.grad()[of.target.cls] = to_stored<Stored>(coefficients.target_grad);
    }

private:
    struct OfRow {
        Row row;
        Target target;
        bool is_read, counts, has_target;
        bool is_apart;       // the target's logit is not among the words: a bias, and the margin, ask for the others'
        float target_logit;  // bias added

        FL_DEVICE int apart() const { return is_apart ? target.cls : -1; }
    };
    struct OfThread {
        Words words;
        float e[kHeld], u[kReadsU ? kHeld : 1];  // exponentials and u_j
        int extra_class;                         // of the number beside the words
        float extra, extra_e, extra_u;
        float unit = 1.0f;  // what the exponentials are multiples of: those of a warp, relative to its own pivot
    };

    template <class Place>
    FL_DEVICE OfRow look_at(int number, const Packed& packed, const Place& place) const {
        const bool counts = (!Place::kIsMixed && !kWithStatistics) || !packed.is_ignored();
        const bool has_target = kReadsU ? packed.cls >= 0 : counts, reads = is_read(packed, place.exists);
        const bool is_apart = (kWithStatistics || bias != 0.0f) && has_target;
        return {row_of_number(number), {packed.cls, !counts}, reads, counts, has_target, is_apart, 0.0f};
    }

    template <class Place>
    FL_DEVICE void read(OfRow& of, const Place& place, OfThread& mine) const {
        mine.words.read(place);
        mine.extra_class = -1, mine.extra = kLowest;
        if (place.may_have_extra()) [[unlikely]] {
            mine.extra_class = place.extra();
            if (of.is_read && mine.extra_class >= 0) mine.extra = to_acc(place.logits()[mine.extra_class]);
        }
        if (of.has_target) of.target_logit = to_acc(place.logits()[of.target.cls]) + bias;
        if (of.is_apart) mine.words.set_apart(mine.extra, of.target.cls, place);
        mine.extra_u = 1.0f;
        if constexpr (kReadsU) {
            const ClassFactorReader<float> factor(p, args, of.row);
            read_factors(factor, of.counts, place, mine.u);
            mine.extra_u = of.counts && mine.extra_class >= 0 ? factor(mine.extra_class) : 0.0f;
        }
    }

    FL_DEVICE float saved_pivot(const OfRow& of) const { return of.counts ? as<float>(p.stats)[of.row.number] : 0.0f; }
    FL_DEVICE float find_pivot(Team& team, const OfRow& of, const OfThread& mine, float& others) const {
        others = largest(team, std::fmax(mine.words.largest(), mine.extra));
        const float pivot = of.is_apart ? std::fmax(others, of.target_logit) : others;
        return pivot == kLowest || !of.is_read ? 0.0f : pivot;
    }

    // The sum of the exponentials, but for that of the logit apart, and for statistics that of distances.
    FL_DEVICE void sum_up(Team& team, const OfRow& of, float others, Exponential<Stored>& exponential, OfThread& mine,
                          SoftmaxState<float>& state, float& weighted) const {
        state.sum += mine.extra_e;
        if constexpr (kMerges) {
            merge(team, others, of.is_apart ? of.target_logit : kLowest, exponential, mine, state);
        } else {
            float sums[kWithStatistics ? 2 : 1] = {state.sum};
            if constexpr (kWithStatistics) sums[1] = weighted;
            team.reduce(sums, 0.0f, Plus());
            state.sum = sums[0];
            if constexpr (kWithStatistics) weighted = sums[1];
        }
    }

    // Of all threads, with the number beside the words and the logit apart.
    FL_DEVICE void sum_factors(Team& team, const OfRow& of, const Exponential<Stored>& exponential,
                               const OfThread& mine, SoftmaxState<float>& state) const {
        if (of.counts && mine.extra_class >= 0 && mine.extra_class != of.apart())
            state.add(exponential.distance(mine.extra), has_shares() ? 1.0f : mine.extra_u, 0.0f);
        float sums[] = {state.centred, state.sum_u};
        team.reduce(sums, 0.0f, Plus());
        state.centred = sums[0], state.sum_u = sums[1];
        if (!of.is_apart) return;
        const float u = kReadsU ? ClassFactorReader<float>(p, args, of.row)(of.target.cls) : 1.0f;
        state.add(exponential.distance(of.target_logit), u, 0.0f);
    }

    // Adds the row to the loss.
    template <class Place>
    FL_DEVICE Coefficients<float> finish(Team& team, const OfRow& of, const Place& place,
                                         const Exponential<Stored>& exponential, float target_e,
                                         const SoftmaxState<float>& state, OfThread& mine) const {
        AffineRow<float> shares{};
        if constexpr (kReadsU)
            if (has_shares()) shares = sum_of_shares(team, place, exponential, state, mine);
        if (!of.counts) {
            if (place.exists) ignore(team, static_cast<int>(of.row.number));
            return {};
        }
        if (has_shares()) return end.finish_shares(of.row, shares, state, team.leads);
        const TargetLogit<float> logit{of.target_logit, exponential.distance(of.target_logit), target_e};
        return end.template finish<kKind>(of.row, of.target, logit, exponential.log(state.sum), state, team.leads);
    }

    // Of all classes, as if none was the target.
    template <class Place>
    FL_DEVICE void write_gradient(Team& team, const Place& place, const Coefficients<float>& coefficients,
                                  const OfThread& mine) const {
        // All have read the target's logit: the gradient may be written in its place. Shuffles do not promise that.
        if (Place::kIsMixed || is_saved()) team.sync();
        const float alpha = kMerges ? coefficients.alpha * mine.unit : coefficients.alpha;
        const auto gradient_of = [&](float of_class, float factor) {
            const float g = alpha * of_class;
            if (kKind == KernelKind::kNoFactors) return g;
            return has_shares() ? g + (coefficients.gamma + coefficients.target_grad * factor)
                                : g + coefficients.gamma * factor;
        };
        Words::write(place, [&](int i, bool) { return gradient_of(mine.e[i], kReadsU ? mine.u[i] : 1.0f); });
        if (place.may_have_extra()) [[unlikely]]
            if (const int cls = place.extra(); cls >= 0)
                place.grad()[cls] = to_stored<Stored>(gradient_of(mine.extra_e, mine.extra_u));
        team.sync();
    }

    // Where more than a warp shares a row, each takes its exponentials relative to the largest of its own logits, so
    // that all wait for each other once. (Row statistics want to know the row's largest before.)
    static constexpr bool kMerges = T::kMayBeWide && !kWithStatistics;
    static FL_DEVICE float largest(Team& team, float x) {
        if constexpr (!kMerges) return largest_of(team, x);
        float only[] = {x};
        reduce_warp(only, Larger());
        return only[0];
    }

    // The sum of the warp, relative to the largest of its logits and the one that is apart, becomes the row's, relative
    // to the largest of all.
    FL_DEVICE void merge(Team& team, float largest, float apart, Exponential<Stored>& exponential, OfThread& mine,
                         SoftmaxState<float>& state) const {
        const float own = std::fmax(largest, apart);
        const auto pivot_of = SoftmaxState<float>::pivot_of;
        const auto relative = [&](float from, float to) {
            return from == kLowest ? 0.0f : Exponential<Stored>(pivot_of(to)).of_pivot(Exponential<Stored>(from));
        };
        float top = own;
        team.merge(top, state.sum, relative);
        mine.unit = relative(own, top);
        state.max = pivot_of(top);
        exponential = Exponential<Stored>(state.max);
    }

    // Kernels that sum no u_j, or make statistics, are for forward alone.
    FL_DEVICE bool is_saved() const { return kKind != KernelKind::kNoFactors && !kWithStatistics && args.is_saved; }
    FL_DEVICE bool has_shares() const { return kReadsU && p.class_factors == ClassFactors::kClassLosses; }
    FL_DEVICE bool sums_u() const {
        if (kKind == KernelKind::kNoFactors || is_saved()) return false;
        return kWithStatistics ? p.class_factors != ClassFactors::kNone : !has_shares() || args.sums_u;
    }

    // u_j of the thread's classes; of what is not there 0, or a number that nothing comes of.
    template <class Place>
    FL_DEVICE void read_factors(const ClassFactorReader<float>& factor, bool reads, const Place& place,
                                float* u) const {
        if (!factor.is_plain()) {
            Words::each_round([&](int k) {
#pragma unroll
                for (int i = k * kNumbers; i < (k + 1) * kNumbers; ++i)
                    u[i] = reads && Words::has_round(place, k) ? factor(Words::class_of(place, i)) : 0.0f;
            });
            return;
        }
        if (sizeof(Stored) == 2 && p.soft_target_is_stored)
            Words::read_numbers(place, factor.template labels<Stored>(), reads, u);
        else
            Words::read_numbers(place, factor.template labels<float>(), reads, u);
        if (p.class_factors == ClassFactors::kClassLosses) return;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) u[i] = factor.of_plain(u[i]);
    }

    // Of all classes with a share, whose losses add up; the shares are multiplied by the losses' beta. Few classes have
    // one where labels are mixed.
    template <class Place>
    FL_DEVICE AffineRow<float> sum_of_shares(Team& team, const Place& place, const Exponential<Stored>& exponential,
                                             const SoftmaxState<float>& state, OfThread& mine) const {
        constexpr int few = 8;
        const float log_sum = exponential.log(state.sum);
        const LossParams<float> params(p.first_param ? as<float>(p.first_param) : args.params);
        float sums[3] = {};
        const auto add = [&](int cls, float& share) {
            const float z = to_acc(place.logits()[cls]);
            const SoftmaxRow<float> softmax = end.template softmax_of<true>(z, exponential.distance(z), log_sum, state);
            const AffineRow<float> of = evaluate_other(p.loss, params, softmax);
            sums[0] += share * of.value, sums[1] += share * of.alpha, sums[2] += share * of.gamma;
            share *= of.beta;
        };
#pragma unroll
        for (int begin = 0; begin < kHeld; begin += few) {
            bool any = false;
#pragma unroll
            for (int i = begin; i < begin + few && i < kHeld; ++i) any |= mine.u[i] != 0.0f;
            if (!any) continue;
#pragma unroll
            for (int i = begin; i < begin + few && i < kHeld; ++i)
                if (mine.u[i] != 0.0f) add(Words::class_of(place, i), mine.u[i]);
        }
        if (mine.extra_u != 0.0f) add(place.extra(), mine.extra_u);
        team.reduce(sums, 0.0f, Plus());
        return {sums[0], sums[1], 0.0f, sums[2]};
    }

    // weighted: for statistics, the sum of each times its distance.
    FL_DEVICE void take_exponentials(const Exponential<Stored>& exponential, OfThread& mine, SoftmaxState<float>& state,
                                     float& weighted) const {
        float* const e = mine.e;
        float sums[2];  // of every other one: they need not wait for each other
#pragma unroll
        for (int i = 0; i < Words::kWords; ++i) {
            Word<Stored>::widen(mine.words.w[i], e + i * kCount);
#pragma unroll
            for (int at = i * kCount; at < (i + 1) * kCount; ++at) {
                const float below = std::fmax(exponential.argument(e[at]), kFarBelow);
                e[at] = exponential(e[at]);
                if constexpr (kWithStatistics) weighted += e[at] * below;
                sums[at % 2] = at < 2 ? e[at] : sums[at % 2] + e[at];
            }
        }
        state.sum = kHeld > 1 ? sums[0] + sums[1] : sums[0];
        mine.extra_e = exponential(mine.extra);
        if constexpr (kWithStatistics)
            weighted = weighted * exponential.unit() + mine.extra_e * distance_of(exponential, mine.extra);
    }

    // The classes' factors and distances but for those of the class apart.
    template <class Place>
    FL_DEVICE void add_factors(const Exponential<Stored>& exponential, const OfThread& mine, int apart,
                               const Place& place, SoftmaxState<float>& state) const {
        const bool are_ones = kOnes || has_shares();
        float arguments = 0.0f;
        Words::each_round([&](int k) {
            if (!Words::has_round(place, k)) return;
            const int cls = Words::class_of(place, k * kNumbers);
            float z[kNumbers];
#pragma unroll
            for (int i = 0; i < Words::kOfAccess; ++i)
                Word<Stored>::widen(mine.words.w[k * Words::kOfAccess + i], z + i * kCount);
            if (are_ones && apart < 0) {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i) arguments += exponential.argument(z[i]);
                state.sum_u += kNumbers;
            } else {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i)
                    if (cls + i != apart)
                        state.add(exponential.distance(z[i]), kReadsU ? mine.u[k * kNumbers + i] : 1.0f, 0.0f);
            }
        });
        state.centred += arguments * exponential.unit();
    }

    // Of sums relative to the exponential's pivot; `all.second` is the largest of the other logits than the target's.
    // An ignored row, which has no target apart, needs no second.
    template <class Place>
    FL_DEVICE void leave_statistics(Team& team, const OfRow& of, const Place& place,
                                    const Exponential<Stored>& exponential, RowSummary<float, int> all,
                                    OfThread& mine) const {
        constexpr float infinity = std::numeric_limits<float>::infinity();
        all.top = of.is_apart ? std::fmax(all.second, of.target_logit) : all.second;
        int first = kHeld;  // of the thread's numbers that are the largest
#pragma unroll
        for (int i = Words::kWords - 1; i >= 0; --i) {
            float z[kCount];
            Word<Stored>::widen(mine.words.w[i], z);
#pragma unroll
            for (int h = kCount - 1; h >= 0; --h)
                if (z[h] == all.top) first = i * kCount + h;
        }
        float lowest[] = {first < kHeld ? static_cast<float>(Words::class_of(place, first)) : infinity};
        if (mine.extra == all.top && mine.extra_class >= 0)
            lowest[0] = std::fmin(lowest[0], static_cast<float>(mine.extra_class));
        team.reduce(lowest, infinity, Smaller());
        if (of.is_apart) {
            all.weighted += exponential(of.target_logit) * distance_of(exponential, of.target_logit);
            if (of.target_logit == all.top) lowest[0] = std::fmin(lowest[0], static_cast<float>(of.target.cls));
        }
        // All masked, or NaN: numbers beyond the row are as large.
        all.index = all.top == kLowest || lowest[0] == infinity ? 0 : static_cast<int>(lowest[0]);
        if (team.leads && place.exists) write_statistics(of, place, exponential, all);
        team.sync();  // before the gradient takes the place of the logits
        if (of.counts) return;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) mine.e[i] = 0.0f;  // an ignored row's may be infinite or NaN
        mine.extra_e = 0.0f;
    }

    // Finite where the exponential is 0.
    static constexpr float kFarBelow = -1e4f;
    static FL_DEVICE float distance_of(const Exponential<Stored>& exponential, float z) {
        return std::fmax(exponential.distance(z), kFarBelow);
    }

    template <class Place>
    FL_DEVICE void write_statistics(const OfRow& of, const Place& place, const Exponential<Stored>& exponential,
                                    const RowSummary<float, int>& all) const {
        write_row_statistics(p, of.row.number, of.target, all.sum, all.index,
                             statistics_of_sums(exponential, of.target_logit, all),
                             [&](int cls) { return to_acc(place.logits()[cls]); });
    }

    const RegisterArgs& args;
    const RowProblem& p;
    const RowEnd<float> end;
    const float bias;
};

}  // namespace fused_losses::cuda
