// Z-Error operators on CUDA: statistics; mask with loss, after the statistics where they are those of the same rows;
// gradient. One kernel each. No atomics but tickets: every sum has an order of its own that follows from the problem's
// size.
#include "cuda/z_error.h"

#include <algorithm>

#include "cuda/grid.cuh"
#include "cuda/row_part.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/softmax_state.cuh"
#include "cuda/z_error_rows.cuh"
#include "losses/cross_entropy.h"

namespace fused_losses::cuda {
namespace {

using z_error::Row;

__device__ unsigned own_counters[kTickets][kOwnCounters];  // of streams

constexpr std::int64_t kTileRows = 1024;               // rows a block looks at together
constexpr std::int64_t kSingleBlockRows = 8 * kBlock;  // up to here one block is quicker than several and a ticket
constexpr std::int64_t kMaxLossBlocks = 1024;
constexpr std::int64_t kMaxMomentBlocks = 4096;
constexpr std::int64_t kMaxChunks = 256;

// Moments of the block's threads.
struct SharedMoments {
    double count[kBlock], mean[kBlock], m2[kBlock];

    FL_DEVICE Moments get(int i) const { return {count[i], mean[i], m2[i]}; }
    FL_DEVICE void set(int i, const Moments& m) {
        count[i] = m.count;
        mean[i] = m.mean;
        m2[i] = m.m2;
    }
};

// Who does what in a block that owns `width` groups: thread = segment * width + group. Segments are consecutive pieces
// of the rows (or of the partial results); threads beyond the last whole segment are idle.
struct ThreadRole {
    int width, segments, group, segment;

    FL_DEVICE explicit ThreadRole(int groups)
        : width(groups), segments(kBlock / groups), group(threadIdx.x % groups), segment(threadIdx.x / groups) {}

    FL_DEVICE bool idle() const { return segment >= segments; }

    // Merges neighbouring segments, then pairs of those, ...: the result is in the first.
    FL_DEVICE Moments merge_segments(SharedMoments& shared, const Moments& mine) const {
        const int me = threadIdx.x;
        shared.set(me, mine);
        for (int step = 1; step < segments; step *= 2) {
            __syncthreads();
            if (idle() || segment % (2 * step) != 0 || segment + step >= segments) continue;
            Moments merged = shared.get(me);
            merged.merge(shared.get(me + step * width));
            shared.set(me, merged);
        }
        return shared.get(me);
    }
};

// Scores of a tile of rows, and where they belong.
struct ScoreTile {
    double score[kTileRows];
    int group_in_range[kTileRows];  // -1: the row does not count here

    FL_DEVICE void fill(const ZProblem& p, std::int64_t begin, int rows, std::int64_t first, int width) {
        for (int i = threadIdx.x; i < rows; i += kBlock) {
            const Row row(p, begin + i);
            const std::int64_t group = z_error::group_of(p, row);
            int local = -1;
            if (group >= first && group < first + width) {
                score[i] = z_error::score_of(p, row, group);
                if (z_error::is_finite(score[i])) local = static_cast<int>(group - first);
            }
            group_in_range[i] = local;
        }
    }
};

struct MomentsMemory {
    ScoreTile tile;
    SharedMoments moments;
};

// One share of the moments: a range of groups in a chunk of rows. Partial results: [chunks][groups] of
// (count, mean, m2); the block that finishes a range last merges them in order.
FL_DEVICE void moments_of_share(const ZProblem& p, const WorkShares& shares, std::int64_t item, MomentsMemory& shared,
                                double* out) {
    const std::int64_t range = item % shares.ranges, chunk = item / shares.ranges;
    const std::int64_t first = range * kBlock, groups = p.num_groups;
    const int width = static_cast<int>(groups - first < kBlock ? groups - first : kBlock);
    const ThreadRole role(width);
    const std::int64_t chunk_begin = chunk * shares.chunk_rows;
    const std::int64_t chunk_end =
        chunk_begin + shares.chunk_rows < p.rows() ? chunk_begin + shares.chunk_rows : p.rows();

    ShiftedSums sums;
    const int segment_rows = static_cast<int>(divide_up(kTileRows, role.segments));
    for (std::int64_t begin = chunk_begin; begin < chunk_end; begin += kTileRows) {
        const int rows = static_cast<int>(chunk_end - begin < kTileRows ? chunk_end - begin : kTileRows);
        __syncthreads();  // the previous tile has been read
        shared.tile.fill(p, begin, rows, first, width);
        __syncthreads();
        if (role.idle()) continue;
        const int segment = role.segment * segment_rows;
        const int end = segment + segment_rows < rows ? segment + segment_rows : rows;
        for (int i = segment; i < end; ++i)
            if (shared.tile.group_in_range[i] == role.group) sums.push(shared.tile.score[i]);
    }
    __syncthreads();  // the moments of an earlier share have been read
    Moments result = role.merge_segments(shared.moments, sums.moments());

    if (shares.chunks > 1) {
        if (role.segment == 0) {
            double* const mine = shares.partials + 3 * (chunk * groups + first + role.group);
            mine[0] = result.count;
            mine[1] = result.mean;
            mine[2] = result.m2;
        }
        if (!arrives_last(shares.tickets + range, shares.chunks)) return;
        Moments total;
        const std::int64_t segment_chunks = divide_up(shares.chunks, role.segments);
        const std::int64_t begin = role.segment * segment_chunks;
        for (std::int64_t c = begin; c < begin + segment_chunks && c < shares.chunks && !role.idle(); ++c) {
            const double* const other = shares.partials + 3 * (c * groups + first + role.group);
            total.merge({__ldcg(other), __ldcg(other + 1), __ldcg(other + 2)});
        }
        result = role.merge_segments(shared.moments, total);
    }
    if (role.segment != 0) return;
    out[first + role.group] = result.count;
    out[groups + first + role.group] = result.mean;
    out[2 * groups + first + role.group] = result.m2;
}

FL_DEVICE void compute_moments(const ZProblem& p, const WorkShares& shares, double* out) {
    __shared__ MomentsMemory shared;
    for (std::int64_t item = blockIdx.x; item < shares.count(); item += gridDim.x)
        moments_of_share(p, shares, item, shared, out);
}

__global__ void __launch_bounds__(kBlock, kMinBlocks<double>)
    reduce_moments(const __grid_constant__ ZProblem p, const __grid_constant__ WorkShares shares, double* out) {
    compute_moments(p, shares, out);
}

// Whether no row has a finite score, and none is to be dropped therefore. For all threads of a block; rare.
FL_DEVICE bool nothing_is_judged(const ZProblem& p) {
    bool judged = false;
    for (std::int64_t n = threadIdx.x; n < p.rows() && !judged; n += kBlock) {
        const Row row(p, n);
        const std::int64_t group = z_error::group_of(p, row);
        judged = group >= 0 && z_error::is_finite(z_error::score_of(p, row, group));
    }
    return !__syncthreads_or(judged);
}

// One share of the rows. Returns whether this thread keeps any.
FL_DEVICE bool mask_share(const ZProblem& p, std::int64_t chunk, std::int64_t chunks, bool keep_all) {
    bool any = false;
    for (std::int64_t n = chunk * kBlock + threadIdx.x; n < p.rows(); n += chunks * kBlock)
        any |= z_error::mask_row(p, Row(p, n), keep_all);
    return any;
}

// counters: kMaskCounters zeros, which are zeros again afterwards: a ticket, and whether any row is kept.
__global__ void __launch_bounds__(kBlock, kMinBlocks<double>)
    mask_rows(const __grid_constant__ ZProblem p, unsigned* counters) {
    unsigned &ticket = counters[0], &any_is_kept = counters[1];
    if (__syncthreads_or(mask_share(p, blockIdx.x, gridDim.x, false)) && threadIdx.x == 0) atomicMax(&any_is_kept, 1u);
    if (!arrives_last(&ticket, gridDim.x)) return;
    const bool none_is_kept = __ldcg(&any_is_kept) == 0;
    __syncthreads();
    if (threadIdx.x == 0) any_is_kept = 0;
    if (none_is_kept && nothing_is_judged(p)) mask_share(p, 0, 1, true);
}

FL_HD int lanes_of_entropies(const ZProblem& p) { return lanes_for(p.num_groups, p.entropy.class_stride); }

// Cross entropies of the rows that belong to a group, each by some lanes of a warp, of which all take part in sums.
template <class A>
FL_DEVICE void compute_entropies(const ZProblem& p) {
    const EntropyScores& e = p.entropy;
    const Dtype dtype = dtype_of(e.logits.type);
    const int count = static_cast<int>(p.num_groups), element = bytes_of(dtype);
    const A params[] = {static_cast<A>(e.label_smoothing)};
    const A bias = e.logit_bias_device ? *as<A>(e.logit_bias_device) : static_cast<A>(e.logit_bias);
    LaneTeam team(lanes_of_entropies(p));
    const ClassesOfThread classes(0, count, team.lane, team.lanes);
    const int at_once = 32 / team.lanes, own = threadIdx.x % 32 / team.lanes;
    const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * (kBlock / 32) * at_once;
    std::int64_t first = (std::int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32) * at_once;
    for (; first < rows; first += step) {
        const std::int64_t n = first + own;
        const bool exists = n < rows;
        const Row row(p, exists ? n : first);
        const std::int64_t group = exists ? z_error::group_of(p, row) : -1;
        const int of_thread = group < 0 ? 0 : classes.count;
        RowPlace place{};
        place.from = static_cast<const char*>(e.logits.data) + e.logits.stride.at(row.outer, row.inner) * element;
        place.from_step = e.class_stride * element;
        auto state = SoftmaxState<A>::empty();
        for (int k = 0; k < of_thread; k += kAtOnce) {
            A z[kAtOnce], ones[kAtOnce];
            read_logits(dtype, place, classes, k, of_thread, z);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (classes.first + (k + i) * classes.step == group) z[i] += bias;
                ones[i] = k + i < of_thread ? A(1) : A(0);
            }
            state.push(z, ones);
        }
        reduce_team(team, state);
        if (!team.leads || group < 0) continue;
        const A log_sum = math::log(state.sum);
        const A own = read_logit<A>(dtype, place, static_cast<int>(group)) + bias;
        const SoftmaxRow<A> softmax{(own - state.max) - log_sum, state.sum_u * log_sum - state.centred, state.sum_u,
                                    A(1), A(count)};
        static_cast<A*>(e.scores)[n] = CrossEntropy::eval(softmax, params).value;
    }
}

// One share of the rows, of which neighbouring threads take neighbours.
template <class A>
FL_DEVICE LossSums loss_of_share(const ZProblem& p, std::int64_t chunk, std::int64_t chunks, bool keep_all) {
    A* const row_values = static_cast<A*>(p.row_values);
    A* const row_weights = static_cast<A*>(p.row_weights);
    LossSums sums{0, 0};
    for (std::int64_t n = chunk * kBlock + threadIdx.x; n < p.rows(); n += chunks * kBlock) {
        const Row row(p, n);
        const auto of_row = z_error::weighted_loss_of<A>(p, row, z_error::mask_row(p, row, keep_all));
        if (row_values) row_values[n] = of_row.value;
        if (row_weights) row_weights[n] = of_row.weight;
        sums.add({static_cast<double>(of_row.value), static_cast<double>(of_row.weight)});
    }
    return sum_over_block(sums);
}

// Partial results: [chunks] of (value, weight).
template <class A, bool kEntropies>
__global__ void __launch_bounds__(kBlock, kMinBlocks<double>)
    masked_loss(const __grid_constant__ ZProblem p, const __grid_constant__ WorkShares moments,
                const __grid_constant__ WorkShares shares, unsigned* barriers) {
    if constexpr (kEntropies) {
        compute_entropies<A>(p);
        grid_group{barriers}.sync();
    }
    if (p.own_moments) {
        compute_moments(p, moments, p.own_moments);
        grid_group{barriers}.sync();
    }
    LossSums total{0, 0};
    for (std::int64_t chunk = blockIdx.x; chunk < shares.chunks; chunk += gridDim.x) {
        total = loss_of_share<A>(p, chunk, shares.chunks, false);
        if (shares.chunks == 1 || threadIdx.x != 0) continue;
        shares.partials[2 * chunk] = total.value;
        shares.partials[2 * chunk + 1] = total.weight;
    }
    if (shares.chunks > 1) {
        if (!arrives_last(shares.tickets, gridDim.x)) return;
        total = sum_of_partials(shares.partials, shares.chunks);
    } else if (blockIdx.x != 0) {
        return;
    }
    if (__syncthreads_or(threadIdx.x == 0 && total.weight == 0) && nothing_is_judged(p))
        total = loss_of_share<A>(p, 0, 1, true);
    if (threadIdx.x != 0) return;
    *static_cast<A*>(p.denominator) = static_cast<A>(total.weight);
    if (p.reduction == Reduction::kNone) return;
    const bool mean = p.reduction == Reduction::kMean;
    *static_cast<A*>(p.loss) = static_cast<A>(mean ? mean_of(total.value, total.weight) : total.value);
}

template <class A>
__global__ void __launch_bounds__(kBlock) gradient(const __grid_constant__ ZProblem p) {
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock;
    for (std::int64_t n = std::int64_t(blockIdx.x) * kBlock + threadIdx.x; n < p.rows(); n += step)
        z_error::write(p.grad, p.input.type, n, z_error::gradient_of<A>(p, Row(p, n)));
}

__global__ void __launch_bounds__(kBlock)
    merge_into_running(double* running, const double* batch, std::int64_t groups, double momentum) {
    const std::int64_t group = std::int64_t(blockIdx.x) * kBlock + threadIdx.x;
    if (group < groups) update_running_moments(running, batch, groups, momentum, group, group + 1);
}

}  // namespace

WorkShares shares_of_moments(const ZProblem& p) {
    WorkShares s;
    s.ranges = divide_up(p.num_groups, kBlock);
    const std::int64_t wanted =
        std::clamp<std::int64_t>(kMaxMomentBlocks / std::max<std::int64_t>(1, s.ranges), 1, kMaxChunks);
    const bool single = p.rows() <= 2 * kTileRows;
    s.chunk_rows = single ? 2 * kTileRows : std::max(kTileRows, divide_up(p.rows(), wanted));
    s.chunks = std::max<std::int64_t>(1, divide_up(p.rows(), s.chunk_rows));
    s.numbers_per_chunk = 3 * p.num_groups;
    return s;
}

WorkShares shares_of_loss(const ZProblem& p) {
    WorkShares s;
    const bool single = p.rows() <= kSingleBlockRows;
    s.chunks = single ? 1 : std::min(divide_up(p.rows(), kBlock), kMaxLossBlocks);
    s.numbers_per_chunk = 2;
    return s;
}

cudaError_t find_own_counters(int number, unsigned*& counters) {
    void* all = nullptr;
    const cudaError_t error = cudaGetSymbolAddress(&all, own_counters);
    counters = static_cast<unsigned*>(all) + std::int64_t(number) * kOwnCounters;
    return error;
}

cudaError_t enqueue_class_moments(const ZProblem& p, const WorkShares& shares, double* moments, cudaStream_t stream) {
    return launch(reduce_moments, static_cast<unsigned>(shares.count()), stream, p, shares, moments);
}

cudaError_t enqueue_z_error_mask(const ZProblem& p, unsigned* counters, cudaStream_t stream) {
    return launch_over_rows(mask_rows, p.rows(), kBlock, stream, p, counters);
}

std::int64_t blocks_of_loss(const ZProblem& p, const WorkShares& moments, const WorkShares& loss) {
    const std::int64_t blocks = p.own_moments ? std::max(moments.count(), loss.count()) : loss.count();
    if (!p.entropy.logits.data) return blocks;
    return std::max(blocks, divide_up(p.rows(), kBlock / lanes_of_entropies(p)));
}

cudaError_t enqueue_z_error_loss(const ZProblem& p, const WorkShares& moments, const WorkShares& loss,
                                 unsigned* barriers, cudaStream_t stream) {
    const bool entropies = p.entropy.logits.data;
    const std::int64_t blocks = blocks_of_loss(p, moments, loss);
    const auto run = [&](auto kernel) {
        if (!entropies && !p.own_moments)
            return launch(kernel, static_cast<unsigned>(blocks), stream, p, moments, loss, barriers);
        return launch_cooperative(kernel, blocks, stream, p, moments, loss, barriers);
    };
    if (p.acc_is_double) return entropies ? run(&masked_loss<double, true>) : run(&masked_loss<double, false>);
    return entropies ? run(&masked_loss<float, true>) : run(&masked_loss<float, false>);
}

cudaError_t enqueue_z_error_gradient(const ZProblem& p, cudaStream_t stream) {
    if (p.acc_is_double) return launch_over_rows(gradient<double>, p.rows(), kBlock, stream, p);
    return launch_over_rows(gradient<float>, p.rows(), kBlock, stream, p);
}

cudaError_t enqueue_update_moments(double* running, const double* batch, std::int64_t groups, double momentum,
                                   cudaStream_t stream) {
    const unsigned blocks = static_cast<unsigned>(std::max<std::int64_t>(1, divide_up(groups, kBlock)));
    return launch(merge_into_running, blocks, stream, running, batch, groups, momentum);
}

}  // namespace fused_losses::cuda
