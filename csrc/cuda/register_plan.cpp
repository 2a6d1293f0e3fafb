// Sharing out rows that stay in registers.
#include "cuda/register_plan.h"

#include "cuda/launch.cuh"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>

namespace fused_losses::cuda {
namespace {

constexpr int kMostSlots = 48;  // numbers of a thread in shared memory: half of the threads that there may be have room
constexpr std::int64_t kMostRows = std::int64_t(1) << 30;  // of which kernels count with 32 bits

// Whether the gradient's rows are written by the same accesses as the logits' are read.
bool is_gradient_alike(const RowProblem& p) {
    if (!p.grad) return true;
    const int element = bytes_of(p.dtype);
    const auto distance = reinterpret_cast<std::intptr_t>(p.grad) - reinterpret_cast<std::intptr_t>(p.logits);
    return p.grad_class_stride == 1 && distance % 16 == 0 &&
           (p.inner <= 1 || (p.logits_stride.inner - p.grad_stride.inner) * element % 16 == 0);
}

// Whether the bytes from a row to the next are numbers of 32 bits.
bool has_narrow_steps(const RowProblem& p) {
    constexpr std::int64_t most = std::int64_t(1) << 28;
    return p.logits_stride.inner < most && p.grad_stride.inner < most && p.target_stride.inner < most;
}

void take_steps(const RowProblem& p, RegisterPlan& plan) {
    const int element = bytes_of(p.dtype);
    plan.logits_step = static_cast<unsigned>(p.logits_stride.inner * element);
    plan.grad_step = static_cast<unsigned>(p.grad_stride.inner * element);
    plan.target_bytes = p.target ? bytes_of(p.index_type) : 0;
    plan.target_step = static_cast<unsigned>(p.target_stride.inner * plan.target_bytes);
}

// Steps over so many classes, if they are numbers of 32 bits.
bool take_class_steps(const RowProblem& p, int classes, RegisterPlan& plan) {
    const std::int64_t bytes = std::int64_t(classes) * bytes_of(p.dtype);
    constexpr std::int64_t most = std::numeric_limits<unsigned>::max();
    if (p.logits_class_stride > most / bytes || p.grad_class_stride > most / bytes) return false;
    plan.logits_step = static_cast<unsigned>(p.logits_class_stride * bytes);
    plan.grad_step = static_cast<unsigned>(p.grad_class_stride * bytes);
    return true;
}

// How often the busiest bank is asked for different words where each lane reads the first of its bytes of a row.
template <class Begin>
int bank_conflicts(std::int64_t row_bytes, int lanes, Begin begin_bytes) {
    std::int64_t words[32][32];  // of each bank, different ones
    int asked[32] = {}, most = 0;
    for (int t = 0; t < 32; ++t) {
        const std::int64_t word = (t / lanes * row_bytes + begin_bytes(t % lanes)) / 4;
        std::int64_t* const of_bank = words[word % 32];
        int& count = asked[word % 32];
        if (std::find(of_bank, of_bank + count, word) != of_bank + count) continue;
        of_bank[count++] = word;
        most = std::max(most, count);
    }
    return most;
}

// Instructions and accesses to shared memory are issued side by side; the latter one at a time for four schedulers.
std::int64_t cost_of(const RowProblem& p, const RegisterPlan& plan, int most_rounds) {
    constexpr int of_row = 140, of_word = 14;
    const std::int64_t instructions = of_row + of_word * most_rounds;
    return plan.lanes * std::max<std::int64_t>(instructions, 2 * 4 * plan.rounds * conflicts_of(p, plan));
}

// Whether rows can be brought to shared memory, and written from there, as they follow each other.
bool can_be_tiles(const RowProblem& p) {
    constexpr int most_classes = 400;
    const bool is_dense = rows_are_dense(p, p.logits_stride, p.logits_class_stride) &&
                          (!p.grad || rows_are_dense(p, p.grad_stride, p.grad_class_stride));
    return bytes_of(p.dtype) < 8 && is_dense && p.num_classes <= most_classes && p.inner <= kMostRows &&
           is_gradient_alike(p);
}

// Tiles that end at 16 bytes; larger ones where there are rows for all warps.
void fill_tile(const RowProblem& p, int most_bytes, int multiprocessors, RegisterPlan& plan) {
    constexpr int warps = 24;
    const int row_bytes = static_cast<int>(p.num_classes) * bytes_of(p.dtype);
    int rows = std::max(32 / plan.lanes, 16 / std::gcd(row_bytes, 16));
    while (2 * rows * row_bytes <= most_bytes && p.rows() >= std::int64_t(2) * rows * warps * multiprocessors)
        rows *= 2;
    plan.row_bytes = row_bytes, plan.tile_rows = rows;
    plan.tile_bytes = rows * row_bytes + (reinterpret_cast<std::uintptr_t>(p.logits) % 16 == 0 ? 0 : 16);
    plan.threads = kTileThreads;
}

// Room in shared memory for `held` classes of each thread, in an odd number of words so that all use different banks.
void give_slots(int held, int slots, int bytes, RegisterPlan& plan) {
    plan.held = held;
    plan.pitch = slots > 0 ? held * slots | 1 : 0;
    plan.slot_bytes = plan.threads * plan.pitch * bytes;
}

// NCHW: neighbouring threads read neighbouring pixels, if there are enough of them to fill the device. And rows of so
// few classes that a warp would have nothing to do.
bool are_columns(const RowProblem& p) {
    constexpr int few_classes = 16;
    const bool are_adjacent = std::abs(p.logits_stride.inner) < std::abs(p.logits_class_stride);
    return p.num_classes <= few_classes || (are_adjacent && p.inner > 1 && p.rows() >= p.num_classes);
}

}  // namespace

RegisterPlan plan_tiles(const RowProblem& p, KernelKind wanted, int multiprocessors) {
    if (!can_be_tiles(p) || !has_narrow_steps(p)) return {};
    const int element = bytes_of(p.dtype), per_word = 4 / element;
    const int classes = static_cast<int>(p.num_classes), row_bytes = classes * element, words = classes / per_word;
    const int shift = static_cast<int>(reinterpret_cast<std::uintptr_t>(p.logits) % 16);
    if (row_bytes % 4 == 0 && shift % 4 != 0) return {};  // a number beside the words at both ends of every row
    const auto plan_with = [&](KernelKind kind) {
        RegisterPlan plan;
        std::int64_t least = 0;
        for (const TileKernel& kernel : kTileKernels)
            for (int lanes = 1; lanes <= 32; lanes *= 2) {
                if (kernel.kind != kind || (kernel.lanes > 0 && kernel.lanes != lanes)) continue;
                if (classes % per_word != 0 && !kernel.takes_ragged()) continue;
                const int fewest = std::max<int>(1, divide_up(words, lanes)), most = kernel.held / per_word;
                RegisterPlan with;
                with.kernel = static_cast<int>(&kernel - kTileKernels), with.kind = kind;
                with.lanes = lanes, with.held = kernel.held;
                const auto consider = [&](int rounds, int longer) {
                    with.rounds = rounds, with.longer = longer;
                    if (rounds > most || with.count_of(lanes - 1, words) < kernel.always(most)) return;
                    const std::int64_t cost = cost_of(p, with, most);
                    if (plan && cost >= least) return;
                    least = cost;
                    plan = with;
                };
                consider(fewest, lanes);  // the last lane has less, or the last ones,
                consider(fewest + 1, lanes);
                if (words % lanes > 0) consider(fewest, words % lanes);  // or all but a few
            }
        return plan;
    };
    RegisterPlan plan = plan_with(wanted);
    if (!plan && wanted == KernelKind::kNoFactors) plan = plan_with(KernelKind::kUnitFactors);
    if (!plan) return {};
    take_steps(p, plan);
    fill_tile(p, most_tile_bytes(plan.held), multiprocessors, plan);
    plan.is_ragged = classes % per_word != 0;
    return plan;
}

int conflicts_of(const RowProblem& p, const RegisterPlan& plan) {
    return bank_conflicts(p.num_classes * bytes_of(p.dtype), plan.lanes, [&](int l) { return 4 * plan.begin_of(l); });
}

RegisterPlan plan_direct(const RowProblem& p, KernelKind wanted, int largest_cluster) {
    constexpr int few_classes = 32, enough_threads = 256;  // two to four blocks on a multiprocessor
    const int element = bytes_of(p.dtype), numbers = 16 / element;
    const bool is_row_by_row = p.logits_class_stride == 1 && p.outer == 1 && p.inner <= kMostRows;
    if (element == 8 || p.num_classes <= few_classes || !is_row_by_row || !is_gradient_alike(p) || !has_narrow_steps(p))
        return {};
    const std::int64_t accesses = p.num_classes / numbers, fewest = (p.num_classes - numbers + 1) / numbers;
    const auto plan_with = [&](KernelKind kind) {
        RegisterPlan plan;
        std::int64_t least = 0;
        for (const DirectKernel& kernel : kDirectKernels) {
            if (kernel.kind != kind) continue;
            RegisterPlan with;
            const int rounds = kernel.held / numbers;
            while (with.cluster < largest_cluster && divide_up(accesses, with.cluster) > enough_threads * rounds)
                with.cluster *= 2;
            with.block_part = static_cast<int>(divide_up(accesses, with.cluster));
            with.lanes = static_cast<int>(std::max<std::int64_t>(32, divide_up(with.block_part, 32 * rounds) * 32));
            with.kernel = static_cast<int>(&kernel - kDirectKernels);
            with.held = kernel.held, with.kind = kind;
            const std::int64_t cost = std::int64_t(with.lanes) * with.cluster * (150 + 9 * kernel.held);
            const std::int64_t of_last = std::max<std::int64_t>(0, fewest - (with.cluster - 1) * with.block_part);
            if (of_last < with.lanes * kernel.always(rounds) || with.lanes > kernel.most_threads(element) ||
                (kernel.of_warps && with.lanes > 32) || (plan && cost >= least))
                continue;
            least = cost;
            plan = with;
        }
        return plan;
    };
    RegisterPlan plan = plan_with(wanted);
    if (!plan && wanted == KernelKind::kNoFactors) plan = plan_with(KernelKind::kUnitFactors);
    if (!plan) return {};
    take_steps(p, plan);
    plan.threads = plan.lanes == 32 ? kTileThreads : plan.lanes;
    plan.slot_bytes = plan.threads * plan.held * element;  // of their next rows
    plan.is_ragged = p.num_classes % numbers != 0 || reinterpret_cast<std::uintptr_t>(p.logits) % 16 != 0 ||
                     p.logits_stride.inner % numbers != 0;
    return plan;
}

RegisterPlan plan_of_bits(const RowProblem& p, int multiprocessors) {
    RowProblem of_forward = p;
    of_forward.grad = nullptr;
    constexpr KernelKind kind = KernelKind::kOneKept;
    // Who holds which class follows from where rows lie. Hooks of saved tensors may give backward a copy of the logits.
    const bool lie_as_a_copy = reinterpret_cast<std::uintptr_t>(p.logits) % 16 == 0 &&
                               rows_are_dense(p, p.logits_stride, p.logits_class_stride);
    if (!lie_as_a_copy) return {};
    if (plan_tiles(of_forward, kind, multiprocessors)) return plan_tiles(p, kind, multiprocessors);
    const RegisterPlan plan = plan_direct(p, kind, kMaxCluster);
    return plan.cluster == 1 ? plan : RegisterPlan{};  // a cluster may find no place, and would become a smaller one
}

RegisterPlan plan_columns(const RowProblem& p, KernelKind kind) {
    RegisterPlan plan;
    if (bytes_of(p.dtype) == 8 || !are_columns(p) || !take_class_steps(p, 1, plan)) return plan;
    std::int64_t least = 0;
    for (const ColumnKernel& kernel : kColumnKernels) {
        const std::int64_t parts = divide_up(p.num_classes, kernel.held), cost = parts * (20 + kernel.held);
        if (kernel.kind != kind || parts * 32 > kMostColumnThreads || p.num_classes / parts < kernel.always() ||
            (plan && cost >= least))
            continue;
        least = cost;
        plan.kernel = static_cast<int>(&kernel - kColumnKernels), plan.held = kernel.held, plan.kind = kind;
        plan.lanes = static_cast<int>(parts);
    }
    if (!plan) return plan;
    plan.is_column = true;
    plan.threads = 32 * plan.lanes;
    const auto is_paired = [](const void* begin, const RowStride& row, std::int64_t classes) {
        return row.inner == 1 && row.outer % 2 == 0 && classes % 2 == 0 &&
               reinterpret_cast<std::uintptr_t>(begin) % 4 == 0;
    };
    // Of an odd number of rows and one class, strides do not say that the last row has none beside it.
    plan.is_paired = p.inner % 2 == 0 && is_paired(p.logits, p.logits_stride, p.logits_class_stride) &&
                     (!p.grad || is_paired(p.grad, p.grad_stride, p.grad_class_stride));
    return plan;
}

RegisterPlan plan_kept_tiles(const RowProblem& p, int numbers, int multiprocessors) {
    constexpr int most_bytes = 2048;
    if (!can_be_tiles(p) || !has_narrow_steps(p)) return {};
    const int element = bytes_of(p.dtype), classes = static_cast<int>(p.num_classes), most = kMostSlots / numbers;
    RegisterPlan plan;
    take_steps(p, plan);
    for (plan.lanes = 1; plan.lanes * most < classes;) plan.lanes *= 2;
    plan.rounds = static_cast<int>(divide_up(classes, plan.lanes));
    const auto conflicts = [&](int each) {
        return bank_conflicts(classes * element, plan.lanes, [&](int l) { return l * each * element; });
    };
    if (plan.rounds < most && conflicts(plan.rounds + 1) < conflicts(plan.rounds)) ++plan.rounds;
    fill_tile(p, most_bytes, multiprocessors, plan);
    give_slots(plan.rounds, numbers, 4, plan);
    return plan;
}

RegisterPlan plan_kept_rows(const RowProblem& p, int numbers, int largest_cluster) {
    constexpr int enough_threads = 256;
    const int most = kMostSlots / numbers;
    RegisterPlan plan;
    if ((plan.is_column = are_columns(p))) {
        if (p.num_classes > most * (kMostColumnThreads / 32)) return {};
        plan.lanes = static_cast<int>(divide_up(p.num_classes, most));
        plan.threads = plan.lanes * std::max(32, 128 / plan.lanes / 32 * 32);
        plan.block_part = static_cast<int>(p.num_classes);
    } else {
        while (plan.cluster < largest_cluster && divide_up(p.num_classes, plan.cluster) > enough_threads * most)
            plan.cluster *= 2;
        const std::int64_t part = divide_up(p.num_classes, plan.cluster), lanes = divide_up(part, 32 * most) * 32;
        if (lanes > kMostColumnThreads) return {};
        plan.block_part = static_cast<int>(part);
        plan.lanes = static_cast<int>(lanes);
        plan.threads = plan.lanes == 32 ? kTileThreads : plan.lanes;
    }
    if (!take_class_steps(p, plan.lanes, plan)) return {};
    give_slots(static_cast<int>(divide_up(plan.block_part, plan.lanes)), numbers, 4, plan);
    return plan;
}

RegisterPlan plan_any_rows(const RowProblem& p, int slots) {
    constexpr int threads = 256, classes_of_warp = 1024, parts = 8, few_classes = 64, held = 8;
    RegisterPlan plan;
    plan.is_column = are_columns(p);
    if (plan.is_column)
        plan.lanes = p.num_classes <= few_classes ? 1 : parts;
    else
        plan.lanes = p.num_classes <= classes_of_warp ? 32 : threads;
    plan.block_part = static_cast<int>(p.num_classes);
    plan.threads = threads;
    give_slots(held, slots, p.dtype == Dtype::kFloat64 ? 8 : 4, plan);
    return plan;
}

}  // namespace fused_losses::cuda
