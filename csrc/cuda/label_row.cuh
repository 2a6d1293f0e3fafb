// A row of a softmax loss of which more is asked than the loss of one label: statistics of the row, two labels with a
// factor each, or a share of every class; and the gradient from the logits alone.
#pragma once

#include "cuda/kept_rows.cuh"
#include "cuda/row_end.cuh"

namespace fused_losses::cuda {

// Whether the loss of a label reads the sums with u_j.
inline bool label_sums_u(const RowProblem& p) {
    ClassFactors factors = p.class_factors;
    if (factors == ClassFactors::kClassLosses)
        visit_loss(SoftmaxLosses{}, p.loss, [&]<class Loss>() { factors = Loss::class_factors(p.params); });
    return factors != ClassFactors::kNone;
}

// Of a row. Without a second one that is an ignored one.
struct Labels {
    Target of[2];

    FL_DEVICE bool are_ignored() const { return of[0].ignored && of[1].ignored; }
};

// lam of the first label, 1 - lam of the second.
template <class A>
FL_DEVICE A lam_of_label(const RowProblem& p, const Row& row, int k) {
    if (!p.other_target) return A(1);
    const A first = p.lam ? as<A>(p.lam)[p.lam_stride.at(row.outer, row.inner)] : A(p.lam_of_all);
    return k == 0 ? first : A(1) - first;
}

// One without a share counts as ignored.
template <class A>
FL_DEVICE Labels labels_of(const RowProblem& p, const Row& row) {
    Labels labels{{target_of(p, row), {0, true}}};
    if (!p.other_target) return labels;
    const std::int64_t offset = p.other_target_stride.at(row.outer, row.inner) * bytes_of(p.index_type);
    const int cls = label_or(-1, p, p.other_target, offset);
    labels.of[1] = {max(cls, 0), cls < 0};
    for (int k = 0; k < 2; ++k) labels.of[k].ignored |= lam_of_label<A>(p, row, k) == A(0);
    return labels;
}

// What the loss of a row's label k is multiplied by, besides weights and the denominator of all.
template <class A>
FL_DEVICE A factor_of_label(const RowProblem& p, const Row& row, int k) {
    const A lam = lam_of_label<A>(p, row, k);
    if (!p.label_denominators) return lam;
    const A denominator = as<A>(p.label_denominators)[k];
    return denominator == A(0) ? A(0) : lam / denominator;
}

// kKeeps: the whole row has a place in shared memory. kShares: every class has a share in place of labels.
template <class A, bool kKeeps, bool kShares>
class LabelRow {
public:
    // Of a class, in shared memory: its share, in the end times beta; the logit, in the end its exponential or p.
    static constexpr int n = kKeeps && kShares ? 2 : 1;

    FL_DEVICE LabelRow(const PlannedArgs<A>& a, const ClassesOfThread& c, void* memory)
        : args(a),
          p(a.problem),
          classes(c),
          slots{static_cast<A*>(memory) + threadIdx.x * a.plan.pitch},
          bias(bias_of(a)) {}

    // For all threads of the team. Those of rows that do not exist, or are ignored, have something to do for the
    // others' sake.
    template <class Team>
    FL_DEVICE void run(Team& team, const Row& row, bool exists, const RowPlace& place, LossSums& sums) const {
        const Labels labels = exists ? labels_of<A>(p, row) : Labels{{{0, true}, {0, true}}};
        const bool counts = exists && !labels.are_ignored(), is_looked_at = exists && !kShares && p.argmax;
        OfThread mine{row, place, counts || is_looked_at ? classes.count : 0, -1, {A(0), A(0)}};
        if (!kShares && mine.count > 0) {
            mine.target_at = classes.place_of(labels.of[0].cls);
            mine.label_logit[0] = read_logit<A>(p.dtype, place, labels.of[0].cls) + bias;
            if (p.other_target) mine.label_logit[1] = read_logit<A>(p.dtype, place, labels.of[1].cls);
        }
        if (kKeeps) read(mine, 0);
        if (!kShares && p.argmax)
            take_row_statistics<A>(
                team, p, row.number, labels.of[0], exists,
                part_of_kept<A, n>(p.dtype, place, classes, [&](auto body) { each_class(mine, body); }));
        if (!counts) mine.count = 0;
        Softmax softmax{sum_up(team, mine)};
        softmax.log_sum = math::log(softmax.state.sum);
        Result of{};
        if constexpr (kShares)
            of = of_shares(team, mine, softmax);
        else if (counts)
            of = of_labels(mine, labels, softmax);
        if (team.leads && exists) record(row, labels.of[0], counts, of.value, sums);
        // All have read the labels' logits: in a tile, the gradient may be written in their place. Shuffles do not
        // promise that.
        if constexpr (std::is_same_v<std::remove_const_t<Team>, LaneTeam<>>) team.sync();
        if (p.grad && exists) write_gradient(mine, labels, counts, softmax, of);
    }

private:
    struct OfThread {
        Row row;
        RowPlace place;
        int count, target_at;
        A label_logit[2];  // bias added
    };
    struct Softmax {
        SoftmaxState<A> state;
        A log_sum = A(0);
    };
    // grad_j = alpha exp(z_j - max) + gamma u_j + beta[k] [j = label k]; where classes have shares: alpha p_j +
    // gamma u_j + s_j beta_j
    struct Result {
        A value, alpha, gamma, beta[2];
    };

    FL_DEVICE int held() const { return args.plan.held; }
    FL_DEVICE int class_at(int k) const { return classes.first + k * classes.step; }
    FL_DEVICE A u_of(int cls) const {
        return p.class_factors == ClassFactors::kClassWeights && p.class_weight ? as<A>(p.class_weight)[cls] : A(1);
    }
    FL_DEVICE A share_at(const OfThread& mine, int cls) const { return ClassFactorReader<A>(p, args, mine.row)(cls); }

    FL_DEVICE void read(const OfThread& mine, int begin) const {
        const int count = min(mine.count - begin, held());
        read_into(slots, p.dtype, mine.place, classes, begin, count);
        if constexpr (n == 2) {
            const ClassFactorReader<A> factor(p, args, mine.row);
#pragma unroll 4
            for (int k = 0; k < count; ++k) slots.of(k)[0] = factor(class_at(begin + k));
        }
    }

    // body(numbers of the class, its number among the thread's) for all of them.
    template <int kUnroll = 4, class Body>
    FL_DEVICE void each_class(const OfThread& mine, Body body) const {
        for (int begin = 0; begin < mine.count; begin += held()) {
            if (!kKeeps) read(mine, begin);
            const int count = min(mine.count - begin, held());
#pragma unroll kUnroll
            for (int k = 0; k < count; ++k) body(slots.of(k), begin + k);
            if (kKeeps) break;
        }
    }

    static FL_DEVICE A logit(const OfThread& mine, const A* kept, int number) {
        return !kShares && number == mine.target_at ? mine.label_logit[0] : kept[n - 1];
    }

    // The softmax sums relative to state.max, which is no infinity of a row whose classes are all masked.
    template <class Team>
    FL_DEVICE SoftmaxState<A> sum_up(Team& team, const OfThread& mine) const {
        auto state = SoftmaxState<A>::empty();
        each_class(mine,
                   [&](const A* kept, int number) { state.max = Larger()(state.max, logit(mine, kept, number)); });
        state.max = state.pivot_of(largest_of(team, state.max));
        each_class(mine, [&](A* kept, int number) {
            const A distance = logit(mine, kept, number) - state.max, e = math::exp_not_positive(distance);
            if (args.sums_u)
                state.add(distance, u_of(class_at(number)), e);
            else
                state.sum += e;
            if (kKeeps && !kShares) kept[n - 1] = e;
        });
        A sums[] = {state.sum, state.centred, state.sum_u};
        team.reduce(sums, A(0), Plus());
        state.sum = sums[0], state.centred = sums[1], state.sum_u = sums[2];
        return state;
    }

    FL_DEVICE AffineRow<A> of_label(A label_logit, A class_weight, const Softmax& softmax) const {
        const SoftmaxState<A>& state = softmax.state;
        const A below_max = label_logit - state.max, log_p = below_max - softmax.log_sum;
        SoftmaxRow<A> row;
        row.log_p = log_p > A(0) ? A(0) : log_p;  // by rounding, where p is 1
        row.sum_neg_log_p = state.sum_u * softmax.log_sum - state.centred;
        row.sum_u = state.sum_u;
        row.class_weight = class_weight;
        row.num_classes = A(p.num_classes);
        row.below_max = below_max;
        return evaluate<KernelKind::kReadFactors>(p, args.params, row);
    }

    FL_DEVICE Result of_labels(const OfThread& mine, const Labels& labels, const Softmax& softmax) const {
        Result all{};
        for (int k = 0; k < 2; ++k) {
            const A factor = labels.of[k].ignored ? A(0) : factor_of_label<A>(p, mine.row, k);
            if (factor == A(0)) continue;
            const AffineRow<A> of = of_label(mine.label_logit[k], class_weight_of<A>(p, labels.of[k]), softmax);
            all.value += factor * of.value;
            all.alpha += factor * of.alpha / softmax.state.sum;
            all.gamma += factor * of.gamma;
            all.beta[k] = factor * of.beta;
        }
        return all;
    }

    // Another pass: sums over all classes of what each has a share of.
    template <class Team>
    FL_DEVICE Result of_shares(Team& team, const OfThread& mine, const Softmax& softmax) const {
        A sums[3] = {};
        each_class<1>(mine, [&](A* kept, int number) {
            const A z = kept[n - 1], share = kKeeps ? kept[0] : share_at(mine, class_at(number));
            AffineRow<A> of{};
            if (share != A(0)) of = of_label(z, A(1), softmax);  // nearly never where two labels are mixed
            sums[0] += share * of.value;
            sums[1] += share * of.alpha;
            sums[2] += share * of.gamma;
            if constexpr (kKeeps) {
                kept[0] = share * of.beta;
                kept[1] = probability(z, softmax);
            }
        });
        team.reduce(sums, A(0), Plus());
        return {sums[0], sums[1], sums[2], {A(0), A(0)}};
    }

    static FL_DEVICE A probability(A z, const Softmax& softmax) {
        return math::exp_not_positive((z - softmax.state.max) - softmax.log_sum);
    }

    FL_DEVICE void record(const Row& row, const Target& target, bool counts, A value, LossSums& sums) const {
        A weighted = A(0);
        if (counts) {
            const A sample_weight = sample_weight_of<A>(p, row);
            weighted = sample_weight * value;
            sums.add({static_cast<double>(weighted),
                      static_cast<double>(kShares ? sample_weight : sample_weight * class_weight_of<A>(p, target))});
        }
        if (p.row_values) static_cast<A*>(p.row_values)[row.number] = weighted;
    }

    FL_DEVICE void write_gradient(const OfThread& mine, const Labels& labels, bool counts, const Softmax& softmax,
                                  const Result& of) const {
        const A scale = counts ? factor_of_row(mine.row) * sample_weight_of<A>(p, mine.row) : A(0);
        for (int begin = 0; begin < classes.count; begin += held()) {
            const int count = min(classes.count - begin, held());
            if (!kKeeps) read(mine, begin);
#pragma unroll 4
            for (int k = 0; k < count; ++k) {
                A* const kept = slots.of(k);
                kept[n - 1] = counts ? scale * gradient(mine, labels, softmax, of, kept, begin + k) : A(0);
            }
            write_from(slots, p.dtype, mine.place, classes, begin, count);
            if (kKeeps) break;
        }
    }

    // The denominator may be an assumed one where forward writes the gradient.
    FL_DEVICE A factor_of_row(const Row& row) const {
        return p.upstream ? upstream_over_denominator<A>(p, row) : written_inverse_denominator<A>(p);
    }

    FL_DEVICE A gradient(const OfThread& mine, const Labels& labels, const Softmax& softmax, const Result& of,
                         const A* kept, int number) const {
        const int cls = class_at(number);
        A g = args.sums_u ? of.gamma * u_of(cls) : A(0);
        if constexpr (!kShares) {
            const A e = kKeeps ? kept[0] : math::exp_not_positive(logit(mine, kept, number) - softmax.state.max);
            g += of.alpha * e;
            for (int k = 0; k < 2; ++k)
                if (cls == labels.of[k].cls) g += of.beta[k];
        } else if constexpr (kKeeps) {
            g += of.alpha * kept[1] + kept[0];
        } else {
            const A share = share_at(mine, cls);
            g += of.alpha * probability(kept[0], softmax);
            if (share != A(0)) g += share * of_label(kept[0], A(1), softmax).beta;
        }
        return g;
    }

    const PlannedArgs<A>& args;
    const RowProblem& p;
    const ClassesOfThread classes;
    const Slots<A, n> slots;
    const A bias;
};

}  // namespace fused_losses::cuda
