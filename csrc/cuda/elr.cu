// Early-learning regularisation: the lanes of a warp share a row where its classes are contiguous, else a thread has
// one. The first loop over a row brings logits and memory into the caches, the last writes memory and gradient.
#include "losses/elr.h"

#include "cuda/launch.cuh"
#include "cuda/row_access.cuh"
#include "cuda/row_sums.cuh"

namespace fused_losses::cuda {
namespace {

// kThreads threads to a row.
template <class Stored, class Kept, int kThreads>
class ElrRows {
    using A = acc_t<Stored>;

public:
    FL_DEVICE ElrRows(const RowProblem& problem, const ElrMemory& memory)
        : p(problem),
          m(memory),
          lane(problem),
          beta(m.parameters ? as<A>(m.parameters)[0] : A(m.beta)),
          lam(m.parameters ? as<A>(m.parameters)[1] : A(m.lam)) {}

    FL_DEVICE bool take(std::int64_t number, bool writes) const {
        const Row row = row_at(p, number);
        const Target target = target_of(p, row);
        A* const grad = p.grad ? static_cast<A*>(p.grad) + p.grad_stride.at(row.outer, row.inner) : nullptr;
        A* const value = static_cast<A*>(p.row_values) + number;
        if (target.ignored) {
            if (lane.first == 0) *value = A(0);
            if (grad) lane.each([&](int c) { grad[c * p.grad_class_stride] = A(0); });
            return false;
        }
        const Stored* const x = as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
        const auto logit = [&](int c) { return to_acc(x[c * p.logits_class_stride]); };
        const A top = lane.template max<A>(logit);
        const A sum = lane.template sum<A>([&](int c) { return math::exp(logit(c) - top); }), of_sum = A(1) / sum;
        const auto probability = [&](int c) { return math::exp(logit(c) - top) * of_sum; };
        const bool usable = sum == sum, updates = m.updates && usable;
        A share = A(0);
        if (updates) share = (A(1) - beta) / lane.template sum<A>([&](int c) { return ELR::clamped(probability(c)); });
        Kept* const memory = static_cast<Kept*>(m.rows) + m.place[number] * p.num_classes;
        const auto remembered = [&](int c, A of_class) {
            if (!updates) return memory[c];
            const A t = ELR::remembered<Kept>(A(widen(memory[c])), ELR::clamped(of_class), beta, share);
            return narrow<Kept>(static_cast<float>(t));
        };
        const A rest = lane.template sum<A>([&](int c) {
            const A of_class = probability(c);
            return of_class * (A(1) - A(widen(remembered(c, of_class))));
        });
        const A log_p = (logit(target.cls) - top) - math::log(sum), rest_share = lam / rest;
        const A scale = m.scale ? as<A>(m.scale)[number] : A(1);
        if (lane.first == 0) *value = ELR::value(log_p, rest, lam);
        lane.each([&](int c) {
            const A of_class = probability(c);
            const Kept kept = remembered(c, of_class);
            const A t = A(widen(kept));
            if (writes && updates) memory[c] = kept;
            if (!grad) return;
            grad[c * p.grad_class_stride] = scale * (c == target.cls ? ELR::target_gradient(log_p, t, lam, rest_share)
                                                                     : ELR::gradient(of_class, t, lam, rest_share));
        });
        return usable;
    }

private:
    const RowProblem& p;
    const ElrMemory& m;
    const ClassesOfLane<kThreads> lane;
    const A beta, lam;
};

template <class Stored, class Kept, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, true>)
    elr_rows(const __grid_constant__ RowProblem p, const __grid_constant__ ElrMemory m) {
    const ElrRows<Stored, Kept, kThreads> rows(p, m);
    const std::int64_t step = std::int64_t(gridDim.x) * (kBlock / kThreads);
    std::int64_t unit = std::int64_t(blockIdx.x) * (kBlock / kThreads) + threadIdx.x / kThreads;
    for (; unit < p.rows(); unit += step)  // of all lanes of a warp alike
        take_unit(m, unit, p.rows(), [&](std::int64_t row, bool writes) { return rows.take(row, writes); });
}

template <class Stored, class Kept>
cudaError_t enqueue_kept(const RowProblem& p, const ElrMemory& m, cudaStream_t stream) {
    constexpr int few_classes = 16;
    if (p.logits_class_stride == 1 && p.num_classes > few_classes)
        return launch(elr_rows<Stored, Kept, kWarp>, blocks_for(p.rows(), kBlock / kWarp), stream, p, m);
    return launch(elr_rows<Stored, Kept, 1>, blocks_for(p.rows(), kBlock), stream, p, m);
}

template <class Stored>
cudaError_t enqueue_as(const RowProblem& p, const ElrMemory& m, cudaStream_t stream) {
    return m.is_bfloat16 ? enqueue_kept<Stored, BFloat16>(p, m, stream) : enqueue_kept<Stored, float>(p, m, stream);
}

}  // namespace

cudaError_t enqueue_elr(const RowProblem& p, const ElrMemory& m, cudaStream_t stream) {
    switch (p.dtype) {
        case Dtype::kFloat64: return enqueue_as<double>(p, m, stream);
        case Dtype::kFloat32: return enqueue_as<float>(p, m, stream);
        case Dtype::kFloat16: return enqueue_as<Half>(p, m, stream);
        case Dtype::kBFloat16: return enqueue_as<BFloat16>(p, m, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace fused_losses::cuda
