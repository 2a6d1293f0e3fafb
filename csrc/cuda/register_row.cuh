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
    static constexpr bool kRagged = true, kReadsRows = true;

    FL_DEVICE RegisterRow(const RegisterArgs& a, LossSums& sums)
        : args(a),
          p(a.problem),
          end(a, sums),
          bias(bias_of(a)),
          inverse_denominator(written_inverse_denominator<float>(p)) {}

    // Whether the logits of a row are read: those of an ignored one for its statistics alone.
    static FL_DEVICE bool is_read(const Packed& target, bool exists) {
        return kWithStatistics ? exists : !target.is_ignored();
    }

    // What is kept of an ignored row. For all threads of the team.
    FL_DEVICE void ignore(const Team& team, int number) const {
        if (!is_saved()) end.ignore({number, 0, number}, team.leads);
    }

    // The gradient of a row that the team leaves out.
    template <class Place>
    FL_DEVICE void write_zeros(const Place& place) const {
        if (p.grad) Words::write_zeros(place);
    }

    // For all threads of the team.
    template <class Place>
    FL_DEVICE void run(Team& team, int number, const Packed& packed, const Place& place) const {
        const bool reads = (!Place::kIsMixed && !kWithStatistics) || !packed.is_ignored();
        const bool has_target = kReadsU ? packed.cls >= 0 : reads;
        const Target target{packed.cls, !reads};
        const Row row{number, 0, number};
        // A bias, and the margin, ask for the largest of the other logits.
        const bool is_apart = (kWithStatistics || bias != 0.0f) && has_target;
        Words words;
        words.read(place);
        const int extra_class = place.extra();
        float extra = kLowest;
        if (is_read(packed, place.exists) && extra_class >= 0) extra = to_acc(place.logits()[extra_class]);
        const float target_logit = has_target ? to_acc(place.logits()[target.cls]) + bias : 0.0f;
        if (is_apart) words.set_apart(extra, target.cls, place);
        const ClassFactorReader<float> factor(p, args, row);
        float u[kReadsU ? kHeld : 1] = {}, extra_u = 1.0f;
        if constexpr (kReadsU) {
            read_factors(factor, reads, place, u);
            extra_u = reads && extra_class >= 0 ? factor(extra_class) : 0.0f;
        }

        float pivot, others = 0.0f, weighted = 0.0f;
        if (is_saved()) {
            pivot = reads ? as<float>(p.stats)[number] : 0.0f;
        } else {
            others = pivot = largest(team, std::fmax(words.largest(), extra));
            if (is_apart) pivot = std::fmax(pivot, target_logit);
            if (pivot == kLowest || !is_read(packed, place.exists)) pivot = 0.0f;
        }
        Exponential<Stored> exponential(pivot);
        float e[kHeld];
        SoftmaxState<float> state{pivot, 0.0f, 0.0f, 0.0f};
        take_exponentials(exponential, words.w, e, state, weighted);
        float extra_e = exponential(extra);
        if constexpr (kWithStatistics) weighted += extra_e * distance_of(exponential, extra);
        if (!is_saved()) {
            state.sum += extra_e;
            if constexpr (kMerges) {
                merge(team, others, is_apart ? target_logit : kLowest, exponential, e, extra_e, state);
            } else {
                float sums[kWithStatistics ? 2 : 1] = {state.sum};
                if constexpr (kWithStatistics) sums[1] = weighted;
                team.reduce(sums, 0.0f, Plus());
                state.sum = sums[0];
                if constexpr (kWithStatistics) weighted = sums[1];
            }
        }
        if constexpr (kKind != KernelKind::kNoFactors)
            if (reads && sums_u()) add_factors(exponential, words.w, state, u, is_apart ? target.cls : -1, place);
        const float target_e = exponential(target_logit);
        Coefficients<float> coefficients{};
        if (is_saved()) {
            if (reads) coefficients = saved_coefficients<float>(p, row);
        } else {
            if (is_apart) state.sum += target_e;
            if constexpr (kWithStatistics) {
                const RowSummary<float, int> all = summary(team, place, exponential, words.w, extra, others, state.sum,
                                                           weighted, is_apart ? target.cls : -1, target_logit);
                if (team.leads && place.exists) write_statistics(number, target, place, exponential, target_logit, all);
                team.sync();  // before the gradient takes the place of the logits
                if (!reads) forget(e, extra_e);
            }
            if (sums_u()) {
                if (reads && extra_class >= 0 && !(is_apart && extra_class == target.cls))
                    state.add(exponential.distance(extra), has_shares() ? 1.0f : extra_u, 0.0f);
                float sums[] = {state.centred, state.sum_u};
                team.reduce(sums, 0.0f, Plus());
                state.centred = sums[0], state.sum_u = sums[1];
                if (is_apart) state.add(exponential.distance(target_logit), kReadsU ? factor(target.cls) : 1.0f, 0.0f);
            }
            AffineRow<float> shares{};
            if constexpr (kReadsU)
                if (has_shares()) shares = sum_of_shares(team, place, exponential, state, u, extra_u);
            if (reads) {
                coefficients = has_shares() ? end.finish_shares(row, shares, state, team.leads)
                                            : end.template finish<kKind>(row, target, target_logit,
                                                                         exponential.distance(target_logit), target_e,
                                                                         exponential.log(state.sum), state, team.leads);
                coefficients.scale(has_shares() && p.upstream ? upstream_over_denominator<float>(p, row)
                                                              : args.upstream_of(row, inverse_denominator));
            } else if (place.exists) {
                ignore(team, number);
            }
        }
        if (!p.grad) return;
        write_gradient(team, place, coefficients, e, u, extra_class, extra_e, extra_u);
        if (has_target && place.owns(target.cls))
            place.grad()[target.cls] = to_stored<Stored>(coefficients.target_grad);
    }

private:
    // Of all classes, as if none was the target.
    template <class Place>
    FL_DEVICE void write_gradient(Team& team, const Place& place, const Coefficients<float>& coefficients,
                                  const float* e, const float* u, int extra_class, float extra_e, float extra_u) const {
        // All have read the target's logit: the gradient may be written in its place. Shuffles do not promise that.
        if (Place::kIsMixed || is_saved()) team.sync();
        const auto gradient_of = [&](float of_class, float factor) {
            const float g = coefficients.alpha * of_class;
            if (kKind == KernelKind::kNoFactors) return g;
            return has_shares() ? g + (coefficients.gamma + coefficients.target_grad * factor)
                                : g + coefficients.gamma * factor;
        };
        Words::write(place, [&](int i, bool) { return gradient_of(e[i], kReadsU ? u[i] : 1.0f); });
        if (extra_class >= 0) place.grad()[extra_class] = to_stored<Stored>(gradient_of(extra_e, extra_u));
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

    // Sum and exponentials of the warp, relative to the largest of its logits and the one that is apart, become the
    // row's sum and exponentials relative to the largest of all.
    FL_DEVICE void merge(Team& team, float largest, float apart, Exponential<Stored>& exponential, float* e,
                         float& extra_e, SoftmaxState<float>& state) const {
        const float own = std::fmax(largest, apart);
        const auto pivot_of = SoftmaxState<float>::pivot_of;
        const auto relative = [&](float from, float to) {
            return from == kLowest ? 0.0f : Exponential<Stored>(pivot_of(to)).of_pivot(Exponential<Stored>(from));
        };
        float top = own;
        team.merge(top, state.sum, relative);
        const float by = relative(own, top);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) e[i] *= by;
        extra_e *= by;
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
                                             const SoftmaxState<float>& state, float* u, float& extra_u) const {
        constexpr int few = 8;
        const float log_sum = exponential.log(state.sum);
        const float* const params = p.first_param ? as<float>(p.first_param) : args.params;
        float sums[3] = {};
        const auto add = [&](int cls, float& share) {
            const float z = to_acc(place.logits()[cls]);
            const SoftmaxRow<float> softmax = end.template softmax_of<true>(z, exponential.distance(z), log_sum, state);
            const AffineRow<float> of = evaluate_any(p.loss, params, softmax);
            sums[0] += share * of.value, sums[1] += share * of.alpha, sums[2] += share * of.gamma;
            share *= of.beta;
        };
#pragma unroll
        for (int begin = 0; begin < kHeld; begin += few) {
            bool any = false;
#pragma unroll
            for (int i = begin; i < begin + few && i < kHeld; ++i) any |= u[i] != 0.0f;
            if (!any) continue;
#pragma unroll
            for (int i = begin; i < begin + few && i < kHeld; ++i)
                if (u[i] != 0.0f) add(Words::class_of(place, i), u[i]);
        }
        if (extra_u != 0.0f) add(place.extra(), extra_u);
        team.reduce(sums, 0.0f, Plus());
        return {sums[0], sums[1], 0.0f, sums[2]};
    }

    // weighted: for statistics, the sum of each times its distance.
    FL_DEVICE void take_exponentials(const Exponential<Stored>& exponential, const unsigned* w, float* e,
                                     SoftmaxState<float>& state, float& weighted) const {
        float sums[2];  // of every other one: they need not wait for each other
#pragma unroll
        for (int i = 0; i < Words::kWords; ++i) {
            Word<Stored>::widen(w[i], e + i * kCount);
#pragma unroll
            for (int at = i * kCount; at < (i + 1) * kCount; ++at) {
                const float below = std::fmax(exponential.argument(e[at]), kFarBelow);
                e[at] = exponential(e[at]);
                if constexpr (kWithStatistics) weighted += e[at] * below;
                sums[at % 2] = at < 2 ? e[at] : sums[at % 2] + e[at];
            }
        }
        state.sum = kHeld > 1 ? sums[0] + sums[1] : sums[0];
        weighted *= exponential.unit();
    }

    // The classes' factors and distances but for those of the class apart.
    template <class Place>
    FL_DEVICE void add_factors(const Exponential<Stored>& exponential, const unsigned* w, SoftmaxState<float>& state,
                               const float* u, int apart, const Place& place) const {
        const bool are_ones = kOnes || has_shares();
        float arguments = 0.0f;
        Words::each_round([&](int k) {
            if (!Words::has_round(place, k)) return;
            const int cls = Words::class_of(place, k * kNumbers);
            float z[kNumbers];
#pragma unroll
            for (int i = 0; i < Words::kOfAccess; ++i) Word<Stored>::widen(w[k * Words::kOfAccess + i], z + i * kCount);
            if (are_ones && apart < 0) {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i) arguments += exponential.argument(z[i]);
                state.sum_u += kNumbers;
            } else {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i)
                    if (cls + i != apart)
                        state.add(exponential.distance(z[i]), kReadsU ? u[k * kNumbers + i] : 1.0f, 0.0f);
            }
        });
        state.centred += arguments * exponential.unit();
    }

    // What RowSummary says of the row, with the largest of all logits but the target's as second; relative to the
    // exponential's pivot. `target` is apart, -1 in an ignored row, which needs none.
    template <class Place>
    FL_DEVICE RowSummary<float, int> summary(Team& team, const Place& place, const Exponential<Stored>& exponential,
                                             const unsigned* w, float extra, float others, float sum, float weighted,
                                             int target, float target_logit) const {
        constexpr float infinity = std::numeric_limits<float>::infinity();
        const float top = target >= 0 ? std::fmax(others, target_logit) : others;
        int first = kHeld;  // of the thread's numbers that are the largest
#pragma unroll
        for (int i = Words::kWords - 1; i >= 0; --i) {
            float z[kCount];
            Word<Stored>::widen(w[i], z);
#pragma unroll
            for (int h = kCount - 1; h >= 0; --h)
                if (z[h] == top) first = i * kCount + h;
        }
        float lowest[] = {first < kHeld ? static_cast<float>(Words::class_of(place, first)) : infinity};
        if (extra == top && place.extra() >= 0) lowest[0] = std::fmin(lowest[0], static_cast<float>(place.extra()));
        team.reduce(lowest, infinity, Smaller());
        if (target >= 0) {
            weighted += exponential(target_logit) * distance_of(exponential, target_logit);
            if (target_logit == top) lowest[0] = std::fmin(lowest[0], static_cast<float>(target));
        }
        // All masked, or NaN: numbers beyond the row are as large.
        const int index = top == kLowest || lowest[0] == infinity ? 0 : static_cast<int>(lowest[0]);
        return {top, others, index, sum, weighted};
    }

    // Finite where the exponential is 0.
    static constexpr float kFarBelow = -1e4f;
    static FL_DEVICE float distance_of(const Exponential<Stored>& exponential, float z) {
        return std::fmax(exponential.distance(z), kFarBelow);
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
        for (int i = 0; i < kHeld; ++i) e[i] = 0.0f;
        extra_e = 0.0f;
    }

    const RegisterArgs& args;
    const RowProblem& p;
    const RowEnd<float> end;
    const float bias, inverse_denominator;
};

}  // namespace fused_losses::cuda
