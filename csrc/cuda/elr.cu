// Early-learning regularisation: the lanes of a warp share a row where its classes are contiguous, else a thread has
// one. Short rows stay in registers. Of others the first loop brings logits and memory into the caches, the last writes
// memory and gradient.
#include "losses/elr.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"

namespace fused_losses::cuda {
namespace {

// kThreads threads to a row, of which each has up to kHeld classes in registers; 0: any number of them, in none.
template <class Stored, class Kept, int kThreads, int kHeld>
class ElrRows {
    using A = acc_t<Stored>;
    static constexpr bool kHolds = kHeld > 0;
    static constexpr bool kIsMixed = kThreads > 1 && kThreads < kWarp;  // other lanes of the warp have other rows

public:
    FL_DEVICE ElrRows(const RowProblem& problem, const ElrMemory& memory)
        : p(problem),
          m(memory),
          lane(problem),
          held(problem),
          beta(m.parameters ? as<A>(m.parameters)[0] : A(m.beta)),
          lam(m.parameters ? as<A>(m.parameters)[1] : A(m.lam)) {}

    // exists: whether it is this thread's row, or is there for the others' sake.
    FL_DEVICE bool take(std::int64_t number, bool writes, bool exists = true) const {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        A* const grad = p.grad ? static_cast<A*>(p.grad) + p.grad_stride.at(row.outer, row.inner) : nullptr;
        A* const value = static_cast<A*>(p.row_values) + number;
        if (target.ignored && exists) leave_out(value, grad);
        if (!kIsMixed && target.ignored) return false;
        const bool counts = !kIsMixed || (exists && !target.ignored);
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        Kept* const memory = static_cast<Kept*>(m.rows) + (counts ? m.place[number] : 0) * p.num_classes;
        const auto logit = [&](int c) { return to_acc(x[c * p.logits_class_stride]); };
        const A target_logit = counts ? logit(target.cls) : A(0);
        A top, exponentials[kHolds ? kHeld : 1], memories[kHolds ? kHeld : 1];
        if constexpr (kHolds) {
            if (counts) {
                constexpr A none = -std::numeric_limits<A>::infinity();
                held.read(exponentials, x, kThreads > 1 ? 1 : p.logits_class_stride, none);
                held.read(memories, memory, 1, A(0));
            } else {
                held.each([&](int k) { exponentials[k] = memories[k] = A(0); });
            }
            top = held.max(exponentials);
            held.each([&](int k) { exponentials[k] = math::exp_not_positive(exponentials[k] - top); });
        } else {
            top = lane.template max<A>(logit);
        }
        // Of the thread's k-th class, which is c.
        const auto exponential = [&](int k, int c) {
            if constexpr (kHolds)
                return exponentials[k];
            else
                return math::exp_not_positive(logit(c) - top);
        };
        const A sum = sum_of(exponential), of_sum = A(1) / sum;
        const auto probability = [&](int k, int c) { return exponential(k, c) * of_sum; };
        const bool usable = sum == sum, updates = m.updates && usable;
        A share = A(0);
        if (m.updates)  // by all lanes
            share = (A(1) - beta) / sum_of([&](int k, int c) {
                        const bool is_there = !kHolds || held.has(k);
                        return is_there ? ELR::clamped(probability(k, c)) : A(0);
                    });
        const auto remembered = [&](int k, int c, A of_class) {
            A before;
            if constexpr (kHolds)
                before = memories[k];
            else
                before = A(to_acc(memory[c]));
            if (!updates) return before;
            const A t = ELR::remembered<Kept>(before, ELR::clamped(of_class), beta, share);
            return A(to_acc(to_stored<Kept>(static_cast<float>(t))));
        };
        const A rest = sum_of([&](int k, int c) {
            const A of_class = probability(k, c);
            return of_class * (A(1) - remembered(k, c, of_class));
        });
        const A log_p = (target_logit - top) - math::log(sum), rest_share = lam / rest;
        const A scale = m.scale ? as<A>(m.scale)[number] : A(1);
        if (!counts) return false;
        if (lane.first == 0) *value = ELR::value(log_p, rest, lam);
        const auto gradient = [&](int c, A of_class, A t) {
            return scale * (c == target.cls ? ELR::target_gradient(log_p, t, lam, rest_share)
                                            : ELR::gradient(of_class, t, lam, rest_share));
        };
        if constexpr (kHolds) {
            held.each([&](int k) { memories[k] = remembered(k, held.class_of(k), probability(k, 0)); });
            if (writes && updates)
                held.write(memory, 1, [&](int k) { return to_stored<Kept>(static_cast<float>(memories[k])); });
            if (grad)
                held.write(grad, p.grad_class_stride,
                           [&](int k) { return gradient(held.class_of(k), probability(k, 0), memories[k]); });
        } else {
            lane.each([&](int c) {
                const A of_class = probability(0, c), t = remembered(0, c, of_class);
                if (writes && updates) memory[c] = to_stored<Kept>(static_cast<float>(t));
                if (grad) grad[c * p.grad_class_stride] = gradient(c, of_class, t);
            });
        }
        return usable;
    }

private:
    FL_DEVICE void leave_out(A* value, A* grad) const {
        if (lane.first == 0) *value = A(0);
        if (grad) lane.each([&](int c) { grad[c * p.grad_class_stride] = A(0); });
    }

    // Over the classes of the row. Beyond it, what is held adds something as well.
    template <class Of>
    FL_DEVICE A sum_of(Of of) const {
        if constexpr (kHolds)
            return held.template sum<A>([&](int k) { return of(k, held.class_of(k)); });
        else
            return lane.template sum<A>([&](int c) { return of(0, c); });
    }

    const RowProblem& p;
    const ElrMemory& m;
    const ClassesOfLane<kThreads> lane;
    const HeldClasses<kThreads, kHeld> held;
    const A beta, lam;
};

template <class Stored, class Kept, int kThreads, int kHeld>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, true>)
    elr_rows(const __grid_constant__ RowProblem p, const __grid_constant__ ElrMemory m) {
    const ElrRows<Stored, Kept, kThreads, kHeld> rows(p, m);
    const std::int64_t step = std::int64_t(gridDim.x) * (kBlock / kThreads);
    std::int64_t unit = std::int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
    if constexpr (kThreads > 1 && kThreads < kWarp) {  // no sample has two rows
        const int in_warp = threadIdx.x % kWarp / kThreads;
        for (; unit - in_warp < p.rows(); unit += step) {
            const bool exists = unit < p.rows();
            rows.take(exists ? unit : p.rows() - 1, m.updates, exists);
        }
    } else {
        for (; unit < p.rows(); unit += step)  // of all lanes of a warp alike
            take_unit(m, unit, p.rows(), [&](std::int64_t row, bool writes) { return rows.take(row, writes); });
    }
}

template <class Stored, class Kept>
cudaError_t enqueue_kept(const RowProblem& p, const ElrMemory& m, cudaStream_t stream) {
    constexpr int few_classes = 10, lanes = 8, held = 13;
    const auto launch_for = [&](auto kernel, int threads) {
        return launch(kernel, blocks_for(p.rows(), kBlock / threads), stream, p, m);
    };
    const bool is_contiguous = p.logits_class_stride == 1;
    if constexpr (!kIsForChecking<Stored>) {
        if (p.num_classes <= few_classes) return launch_for(elr_rows<Stored, Kept, 1, few_classes>, 1);
        if (p.num_classes <= lanes * held && is_contiguous && !m.order)
            return launch_for(elr_rows<Stored, Kept, lanes, held>, lanes);
    }
    return is_contiguous ? launch_for(elr_rows<Stored, Kept, kWarp, 0>, kWarp)
                         : launch_for(elr_rows<Stored, Kept, 1, 0>, 1);
}

}  // namespace

cudaError_t enqueue_elr(const RowProblem& p, const ElrMemory& m, cudaStream_t stream) {
    return visit_dtype(p.dtype, [&]<class Stored>() {
        return m.is_bfloat16 ? enqueue_kept<Stored, BFloat16>(p, m, stream) : enqueue_kept<Stored, float>(p, m, stream);
    });
}

}  // namespace fused_losses::cuda
