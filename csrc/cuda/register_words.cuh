// The part of a row that a thread has in registers, as it travels: read by a few accesses, written by as many.
#pragma once

#include "cuda/loss_output.cuh"
#include "cuda/packed.cuh"
#include "cuda/register_launch.cuh"
#include "cuda/row_team.cuh"

namespace fused_losses::cuda {

extern __shared__ uint4 dynamic_shared[];

// In one register. A row that does not exist is an ignored one, of which nothing is kept.
template <KernelKind kKind>
struct PackedTarget {
    static constexpr int kIgnored = -2;
    int cls;

    // The label of a row, if there is the row and has one. Class probabilities alone come without.
    static FL_DEVICE LoadedLabel load(const RegisterArgs& args, int number, bool exists) {
        if (!exists || (kKind == KernelKind::kReadFactors && !args.problem.target)) return {};
        const auto offset = std::uint64_t(args.plan.target_step) * static_cast<unsigned>(number);
        return {args.problem.index_type, static_cast<const char*>(args.problem.target) + offset};
    }

    FL_DEVICE PackedTarget(const RegisterArgs& args, const LoadedLabel& label, bool exists) : cls(kIgnored) {
        if (label.is_class(args)) [[likely]]
            cls = label.cls();
        else if (!exists)
            return;
        else if (kKind == KernelKind::kReadFactors && !args.problem.target)
            cls = -1;
        else
            cls = class_or(kIgnored, args.problem, label.index(args.problem.index_type));
    }
    FL_DEVICE bool is_ignored() const { return cls == kIgnored; }
    FL_DEVICE Target unpacked() const { return {max(cls, 0), cls < 0}; }
};

// Place: where a thread finds its part of a row, as whole accesses `step()` apart.
//     from(), to()         the first; the k-th is there if k * step() < left
//     first()              class of the first number
//     extra()              class of a number beside the accesses, -1 if there is none
//     may_have_extra()     whether there may be one in any row; kMayHaveExtra: whether the kernel knows of any
//     logits(), grad()     the row, from its first class on
//     kIsMixed             whether the warp has other rows as well: those that are ignored, or do not exist, are then
//                          worked on along with the others, but read numbers that are finite; else run() is not called
//                          for them. The row is in a tile, where its gradient takes its place
//     exists               whether there is a row
//     owns(cls)            whether this thread writes the gradient of the target's class
//     has_been_read()      to be called once the accesses are in registers
// What it takes to find them is worked out when it is needed: registers are what is scarce.
//
// Worker: what is done with a row (register_row.cuh, register_multi_reduction.cuh).
//     Stored, Team, Packed, Words      dtype; the threads of a row; its label; what a thread holds of it
//     kRounds, kRagged                 accesses that it has room for; whether some numbers may be beside them
//     kReadsRows                       whether it reads any logits
//     kMayLeaveStatistics              whether row statistics may be asked of the kernel
//     Worker(args, sums)               adds to `sums` what the rows give
//     is_read(packed, exists)          whether the logits of a row are read
//     ignore(team, number)             what is kept of a row that is left out; write_zeros(place): its gradient
//     run(team, number, packed, place) any other row, for all threads of the team
//
// Of the kRounds accesses that a thread has room for, every thread has the first kAlways.
template <class Stored, class Access, int kNumRounds, int kAlways>
struct RegisterWords {
    using OneAccess = RegisterWords<Stored, Access, 1, 1>;
    static constexpr int kRounds = kNumRounds;
    static constexpr int kOfAccess = sizeof(Access) / 4, kCount = Word<Stored>::count, kNumbers = kOfAccess * kCount;
    static constexpr int kWords = kRounds * kOfAccess, kHeld = kRounds * kNumbers;
    static constexpr float kLowest = -std::numeric_limits<float>::infinity();
    unsigned w[kWords];

    template <class Body>
    static FL_DEVICE void each_round(Body body) {
#pragma unroll
        for (int k = 0; k < kRounds; ++k) body(k);
    }
    template <class Place>
    static FL_DEVICE bool has_round(const Place& place, int k) {
        return k < kAlways || place.left > k * place.step();
    }

    // What is not there is -inf.
    template <class Place>
    FL_DEVICE void read(const Place& place) {
        const Access* const from = place.from();
        each_round([&](int k) {
            unsigned lowest[kOfAccess];
#pragma unroll
            for (int i = 0; i < kOfAccess; ++i) lowest[i] = Word<Stored>::lowest;
            const Access x = has_round(place, k) ? from[k * place.step()] : join(lowest);
            std::memcpy(w + k * kOfAccess, &x, sizeof x);
        });
        place.has_been_read();
    }

    // Of other numbers for the row's classes, those of the thread's; 0 where there is none. They lie as the logits do,
    // so that whole accesses begin at 16 bytes if the first does.
    template <class Place, class Number>
    static FL_DEVICE void read_numbers(const Place& place, const Number* row, bool reads, float* x) {
        constexpr int words = kNumbers * sizeof(Number) / 4, n = Word<Number>::count;
        const Number* const from = row + place.first();
        const bool is_aligned = words % 4 == 0 && misalignment(from) == 0;
        each_round([&](int k) {
            const Number* const of_round = from + k * place.step() * kNumbers;
            const bool is_there = reads && has_round(place, k);
            if (is_there && is_aligned) {
#pragma unroll
                for (int i = 0; i < words / 4; ++i) {
                    const uint4 at_once = reinterpret_cast<const uint4*>(of_round)[i];
                    unsigned w[4];
                    std::memcpy(w, &at_once, sizeof w);
#pragma unroll
                    for (int h = 0; h < 4; ++h) Word<Number>::widen(w[h], x + k * kNumbers + (4 * i + h) * n);
                }
            } else {
#pragma unroll
                for (int i = 0; i < kNumbers; ++i) x[k * kNumbers + i] = is_there ? to_acc(of_round[i]) : 0.0f;
            }
        });
    }

    FL_DEVICE void widen(float (&z)[kHeld]) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) Word<Stored>::widen(w[i], z + i * kCount);
    }

    FL_DEVICE float largest() const {
        unsigned top = w[0];
#pragma unroll
        for (int i = 1; i < kWords; ++i) top = Word<Stored>::larger(top, w[i]);
        float z[kCount];
        Word<Stored>::widen(top, z);
        return kCount == 1 ? z[0] : std::fmax(z[0], z[kCount - 1]);
    }

    // The target's logit counts as -inf.
    template <class Place>
    FL_DEVICE void set_apart(float& extra, int target, const Place& place) {
        if (target == place.extra()) extra = kLowest;
        each_round([&](int k) {
            const int in_access = target - (place.first() + k * place.step() * kNumbers);
            if (static_cast<unsigned>(in_access) >= kNumbers) return;
#pragma unroll
            for (int i = 0; i < kOfAccess; ++i) {
                const int at = in_access - i * kCount;
                if (static_cast<unsigned>(at) >= kCount) continue;
                const unsigned own = kCount == 1 ? 0xffffffffu : 0xffffu << 16 * at;
                unsigned& word = w[k * kOfAccess + i];
                word = (word & ~own) | (Word<Stored>::lowest & own);
            }
        });
    }

    // gradient(i, there): of the thread's i-th number.
    template <class Place, class Gradient>
    static FL_DEVICE void write(const Place& place, Gradient gradient) {
        Access* const to = place.to();
        each_round([&](int k) {
            unsigned words[kOfAccess];
#pragma unroll
            for (int i = 0; i < kOfAccess; ++i) {
                float g[kCount];
#pragma unroll
                for (int h = 0; h < kCount; ++h) g[h] = gradient(k * kNumbers + i * kCount + h, has_round(place, k));
                words[i] = Word<Stored>::narrow(g);
            }
            if (has_round(place, k)) store(to + k * place.step(), join(words));
        });
    }
    template <class Place>
    static FL_DEVICE void write_zeros(const Place& place) {
        const unsigned zeros[kOfAccess] = {};
        for (int k = 0; k * place.step() < place.left; ++k) place.to()[k * place.step()] = join(zeros);
        if (place.extra() >= 0) place.grad()[place.extra()] = to_stored<Stored>(0.0f);
    }

    // Of the thread's i-th number.
    template <class Place>
    static FL_DEVICE int class_of(const Place& place, int i) {
        return place.first() + i / kNumbers * place.step() * kNumbers + i % kNumbers;
    }

private:
    static FL_DEVICE Access join(const unsigned* words) {
        Access x;
        std::memcpy(&x, words, sizeof x);
        return x;
    }
    static FL_DEVICE void store(unsigned* to, unsigned x) { *to = x; }
    static FL_DEVICE void store(uint4* to, uint4 x) { store_at_once(to, x); }
};

}  // namespace fused_losses::cuda
