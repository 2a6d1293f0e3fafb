// Sharing out rows that stay in registers.
#include "cuda/register_plan.h"

#include <algorithm>
#include <numeric>

namespace fused_losses::cuda {
namespace {

constexpr std::int64_t kMostRows = std::int64_t(1) << 30;  // of which kernels count with 32 bits

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether the gradient's rows are written by the same accesses as the logits' are read.
bool is_gradient_alike(const RowProblem& p) {
    if (!p.grad) return true;
    const int element = bytes_of(p.dtype);
    const auto distance = reinterpret_cast<std::intptr_t>(p.grad) - reinterpret_cast<std::intptr_t>(p.logits);
    return p.grad_class_stride == 1 && distance % 16 == 0 &&
           (p.inner <= 1 || (p.logits_stride.inner - p.grad_stride.inner) * element % 16 == 0);
}

// How often the busiest bank is asked where each lane reads the first of its `rounds` words of a row.
int bank_conflicts(std::int64_t row_bytes, int lanes, int rounds) {
    int asked[32] = {}, most = 0;
    for (int t = 0; t < 32; ++t) most = std::max(most, ++asked[(t / lanes * row_bytes / 4 + t % lanes * rounds) % 32]);
    return most;
}

// Instructions and accesses to shared memory are issued side by side; the latter one at a time for four schedulers.
std::int64_t cost_of(std::int64_t row_bytes, int lanes, int rounds, int most_rounds) {
    constexpr int of_row = 140, of_word = 14;
    const std::int64_t instructions = of_row + of_word * most_rounds;
    return lanes * std::max<std::int64_t>(instructions, 2 * 4 * rounds * bank_conflicts(row_bytes, lanes, rounds));
}

}  // namespace

RegisterPlan plan_tiles(const RowProblem& p, int multiprocessors) {
    constexpr int most_classes = 400, warps = 24;
    const int element = bytes_of(p.dtype), per_word = 4 / element;
    const bool is_dense = rows_are_dense(p, p.logits_stride, p.logits_class_stride) &&
                          (!p.grad || rows_are_dense(p, p.grad_stride, p.grad_class_stride));
    if (element == 8 || !is_dense || p.num_classes > most_classes || p.inner > kMostRows || !is_gradient_alike(p))
        return {};
    const int classes = static_cast<int>(p.num_classes), row_bytes = classes * element, words = classes / per_word;
    const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(p.logits) % 16);
    if (row_bytes % 4 == 0 && shift % 4 != 0) return {};  // a number beside the words at both ends of every row
    RegisterPlan plan;
    std::int64_t least = 0;
    for (int lanes = 1; lanes <= 32; lanes *= 2)
        for (const int held : kTileHeld) {
            if (p.spread != Spread::kNone && held != kTileHeldWithSpread) continue;
            const int fewest = std::max<int>(1, divide_up(words, lanes)), most = held / per_word;
            for (int rounds = fewest; rounds <= std::min(fewest + 1, most); ++rounds) {
                const std::int64_t cost = cost_of(row_bytes, lanes, rounds, most);
                if (plan && cost >= least) continue;
                least = cost;
                plan.lanes = lanes, plan.rounds = rounds, plan.held = held;
            }
        }
    int rows = std::max(32 / plan.lanes, 16 / std::gcd(row_bytes, 16));
    const int most_bytes = most_tile_bytes(plan.held, p.spread != Spread::kNone);
    while (2 * rows * row_bytes <= most_bytes && p.rows() >= std::int64_t(2) * rows * warps * multiprocessors)
        rows *= 2;
    plan.tile_rows = rows;
    plan.tile_bytes = rows * row_bytes + (shift == 0 ? 0 : 16);
    plan.threads = kTileThreads;
    plan.is_ragged = classes % per_word != 0;
    return plan;
}

int conflicts_of(const RowProblem& p, const RegisterPlan& plan) {
    return bank_conflicts(p.num_classes * bytes_of(p.dtype), plan.lanes, plan.rounds);
}

RegisterPlan plan_direct(const RowProblem& p, int largest_cluster) {
    constexpr int few_classes = 32, enough_threads = 256;  // four blocks on a multiprocessor
    const int element = bytes_of(p.dtype), numbers = 16 / element;
    const bool is_row_by_row = p.logits_class_stride == 1 && p.outer == 1 && p.inner <= kMostRows;
    if (element == 8 || p.num_classes <= few_classes || !is_row_by_row || !is_gradient_alike(p)) return {};
    const std::int64_t accesses = p.num_classes / numbers;
    RegisterPlan plan;
    std::int64_t least = 0;
    for (const int held : kDirectHeld) {
        if ((p.spread != Spread::kNone) != (held == kDirectHeldWithSpread)) continue;
        RegisterPlan with;
        const int rounds = held / numbers;
        while (with.cluster < largest_cluster && divide_up(accesses, with.cluster) > enough_threads * rounds)
            with.cluster *= 2;
        with.share = static_cast<int>(divide_up(accesses, with.cluster));
        with.lanes = static_cast<int>(std::max<std::int64_t>(32, divide_up(with.share, 32 * rounds) * 32));
        with.held = held;
        const std::int64_t cost = with.lanes * with.cluster * (150 + 9 * held);
        if (with.lanes > most_direct_threads(element) || (plan && cost >= least)) continue;
        least = cost;
        plan = with;
    }
    plan.threads = plan.lanes == 32 ? kTileThreads : plan.lanes;
    plan.is_ragged = p.num_classes % numbers != 0 || reinterpret_cast<std::uintptr_t>(p.logits) % 16 != 0 ||
                     p.logits_stride.inner % numbers != 0;
    return plan;
}

}  // namespace fused_losses::cuda
