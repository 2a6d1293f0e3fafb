// The statistics of a row (core/row_statistics.h) from the threads that share it, and where kernels leave them.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "core/row_statistics.h"
#include "cuda/packed.cuh"
#include "cuda/row_team.cuh"

namespace fused_losses::cuda {

struct Smaller {  // NaN loses
    template <class A>
    FL_DEVICE A operator()(A a, A b) const {
        return std::fmin(a, b);
    }
};

// Class numbers as threads compare them: in the order of the numbers, and exact.
template <class A>
struct ClassOrder {
    static constexpr unsigned kLeastNormal = 0x00800000u;
    static FL_DEVICE A of(int cls) {
        if constexpr (sizeof(A) == 4)
            return std::bit_cast<float>(cls + kLeastNormal);
        else
            return A(cls);
    }
    static FL_DEVICE int class_of(A order) {
        if constexpr (sizeof(A) == 4)
            return static_cast<int>(std::bit_cast<unsigned>(order) - kLeastNormal);
        else
            return static_cast<int>(order);
    }
};

// By one thread. sum: of the exponentials; index: of the largest logit; logit_of(cls): read again where there is NaN.
template <class A, class LogitOf>
FL_DEVICE void write_row_statistics(const RowProblem& p, std::int64_t number, const Target& target, A sum, int index,
                                    RowStatisticsOf<A> found, LogitOf logit_of) {
    if (!(sum > A(0))) {  // rare
        const int classes = static_cast<int>(p.num_classes);
        int nan = 0;
        while (nan < classes && logit_of(nan) == logit_of(nan)) ++nan;
        if (nan < classes) index = nan;
        leave_undefined(found, nan < classes);
    }
    const std::int64_t rows = p.rows();
    A* to = static_cast<A*>(p.row_statistics) + number;
    p.argmax[number] = index;
#pragma unroll
    for (int k = 0; k < kRowStatistics; ++k, to += rows)
        *to = target.ignored ? std::numeric_limits<A>::quiet_NaN() : found.v[k];
}

// A thread's part of a row offers
//
//     each(body)         body(logits of some neighbouring classes, the first of these) for all of its logits
//     largest_but(cls)   the largest of them, but for that class's
//     logit_of(cls)      of any class of a row that exists
//
// of the logits as they are. This one takes the first and the last from elsewhere.
template <class A, class Each, class LogitOf>
struct PartOfRow {
    const Each each;
    const LogitOf logit_of;

    FL_DEVICE A largest_but(int cls) const {
        A largest = -std::numeric_limits<A>::infinity();
        each([&](const A(&z)[1], int only) { largest = only == cls ? largest : Larger()(largest, z[0]); });
        return largest;
    }
};
template <class A, class Each, class LogitOf>
FL_DEVICE PartOfRow<A, Each, LogitOf> part_of_row(Each each, LogitOf logit_of) {
    return {each, logit_of};
}

// all.second: of the other logits than the target's.
template <class Stored, class A = acc_t<Stored>>
FL_DEVICE RowStatisticsOf<A> statistics_of_sums(const Exponential<Stored>& exponential, A target_logit,
                                                const RowSummary<A, int>& all) {
    const A log_p = exponential.distance(target_logit) - exponential.log(all.sum);
    return row_statistics_of(log_p, exponential(all.top), all.top, target_logit - all.second, all.sum, all.weighted);
}

// For all threads of the team.
template <class Stored, class Team, class Part>
FL_DEVICE void take_row_statistics(Team& team, const RowProblem& p, std::int64_t number, const Target& target,
                                   bool exists, const Part& part) {
    using A = acc_t<Stored>;
    constexpr A infinity = std::numeric_limits<A>::infinity(), far_below = -200;  // the exponential of that is 0
    constexpr int none = std::numeric_limits<int>::max();
    A others[] = {part.largest_but(target.cls)};
    team.reduce(others, -infinity, Larger());
    const A target_logit = exists ? part.logit_of(target.cls) : A(0);
    RowSummary<A, int> all{Larger()(others[0], target_logit), others[0], none, A(0), A(0)};
    const Exponential<Stored> exponential(all.pivot_of(all.top));
    part.each([&]<int n>(const A(&z)[n], int first) {
        int at = n;  // of the first that is the largest
#pragma unroll
        for (int i = n - 1; i >= 0; --i) {
            if (z[i] == all.top) at = i;
            const A e = exponential(z[i]);
            all.sum += e;
            all.weighted += e * math::at_least(exponential.argument(z[i]), far_below);
        }
        if (at < n) all.index = min(all.index, first + at);
    });
    A lowest[] = {all.index == none ? infinity : ClassOrder<A>::of(all.index)}, sums[] = {all.sum, all.weighted};
    team.reduce(lowest, infinity, Smaller());
    team.reduce(sums, A(0), Plus());
    if (!team.leads || !exists) return;
    all.sum = sums[0], all.weighted = sums[1] * exponential.unit();
    all.index = lowest[0] == infinity ? 0 : ClassOrder<A>::class_of(lowest[0]);  // all are NaN
    write_row_statistics(p, number, target, all.sum, all.index, statistics_of_sums(exponential, target_logit, all),
                         [&](int cls) { return part.logit_of(cls); });
}

}  // namespace fused_losses::cuda
