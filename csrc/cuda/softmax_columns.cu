// Softmax losses of rows that lie side by side, such as the pixels of NCHW: a lane has neighbouring rows, as many as
// four bytes hold, and a few classes of them in registers; the warps of a block share the classes. So all accesses of a
// warp are to neighbours, and packed numbers are of different rows. Forward with its gradient, or backward alone.
#include "cuda/packed.cuh"
#include "cuda/row_end.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kWarp = 32, kMostParts = kMostColumnThreads / kWarp;

template <class Stored, bool kFactors>
class Columns {
    static constexpr int n = Word<Stored>::count;
    static constexpr float kLowest = -std::numeric_limits<float>::infinity();
    using Words = unsigned[kColumnHeld];
    // Of two columns there is no room for them: they are one instruction then.
    static constexpr bool kAgain = n == 2;
    using Exponentials = float[kAgain ? 1 : kColumnHeld][n];

public:
    FL_DEVICE Columns(const RegisterArgs& a, LossSums& sums)
        : args(a),
          p(a.problem),
          end(a, sums),
          bias(bias_of(a)),
          share(written_share<float>(p)),
          lane(threadIdx.x % kWarp),
          part(threadIdx.x / kWarp),
          begin(part * a.plan.share),
          count(max(0, min(a.plan.share, static_cast<int>(p.num_classes) - begin))) {}

    // The columns from `first` on, of an image of the problem's `inner`. For all threads of the block.
    FL_DEVICE void run(std::int64_t outer, std::int64_t first) {
        const Row row{outer * p.inner + first + lane * n, outer, first + lane * n};
        Column of[n];
#pragma unroll
        for (int j = 0; j < n; ++j) of[j] = column(row_of(row, j));
        const Stored* const logits = as<Stored>(p.logits) + p.logits_stride.at(outer, row.inner);
        Words w;
        read(logits, of, w);
        float pivot[n];
        find_pivots(w, of, row, logits, pivot);
        Exponentials e;
        State state[n];
        take_exponentials(w, of, row, pivot, e, state);
        Coefficients<float> c[n];
        find_coefficients(of, row, pivot, state, c);
        if (p.grad) write(of, row, pivot, w, e, c);
    }

private:
    using State = SoftmaxState<float>;

    // In few registers.
    struct Column {
        static constexpr int kIgnored = -2, kMissing = -3;
        int cls;
        float target_logit;

        FL_DEVICE bool exists() const { return cls != kMissing; }
        FL_DEVICE bool reads() const { return cls > kIgnored; }
    };

    FL_DEVICE Column column(const Row& row) const {
        if (row.inner >= p.inner) return {Column::kMissing, 0.0f};
        const Target target = target_of(p, row);
        return {target.ignored ? Column::kIgnored : target.cls, 0.0f};
    }
    FL_DEVICE bool is_apart(const Column& of) const { return bias != 0.0f && of.cls >= 0; }

    // What is not read is -inf.
    FL_DEVICE void read(const Stored* x, const Column (&of)[n], Words& w) const {
        unsigned taken = 0;
#pragma unroll
        for (int j = 0; j < n; ++j)
            if (of[j].reads()) taken |= n == 1 ? 0xffffffffu : 0xffffu << 16 * j;
        x += begin * p.logits_class_stride;
        const bool is_whole = args.plan.is_paired && of[n - 1].exists();
#pragma unroll
        for (int k = 0; k < kColumnHeld; ++k, x += p.logits_class_stride) {
            w[k] = Word<Stored>::lowest;
            if (k >= count || taken == 0) continue;
            if (is_whole)
                w[k] = *reinterpret_cast<const unsigned*>(x);
            else
                w[k] = join(x, p.logits_stride.inner, of);
            w[k] = (w[k] & taken) | (Word<Stored>::lowest & ~taken);
        }
    }

    static FL_DEVICE unsigned join(const Stored* x, std::int64_t stride, const Column (&of)[n]) {
        if constexpr (n == 1) {
            return std::bit_cast<unsigned>(*x);
        } else {
            Stored both[2] = {x[0], x[0]};
            if (of[1].exists()) both[1] = x[stride];
            return Word<Stored>::join(both);
        }
    }

    // Maxima of the columns. With a bias, the target's logit is not that of the column: it counts as -inf in w, for
    // itself after the sums.
    FL_DEVICE void find_pivots(Words& w, Column (&of)[n], const Row& row, const Stored* x, float (&pivot)[n]) {
#pragma unroll
        for (int j = 0; j < n; ++j) {
            if (of[j].cls >= 0)
                of[j].target_logit = to_acc(x[j * p.logits_stride.inner + of[j].cls * p.logits_class_stride]) + bias;
            if (is_apart(of[j])) set_apart(w, of[j].cls - begin, j);
        }
        if (args.is_saved) {
#pragma unroll
            for (int j = 0; j < n; ++j) pivot[j] = of[j].reads() ? as<float>(p.stats)[(row.number + j)] : 0.0f;
            return;
        }
        unsigned top = w[0];
#pragma unroll
        for (int k = 1; k < kColumnHeld; ++k) top = Word<Stored>::larger(top, w[k]);
        Word<Stored>::widen(top, pivot);
        reduce(pivot, Larger());
#pragma unroll
        for (int j = 0; j < n; ++j) {
            if (is_apart(of[j])) pivot[j] = std::fmax(pivot[j], of[j].target_logit);
            if (pivot[j] == kLowest) pivot[j] = 0.0f;
        }
    }

    static FL_DEVICE void set_apart(Words& w, int at, int j) {
        const unsigned own = n == 1 ? 0xffffffffu : 0xffffu << 16 * j;
#pragma unroll
        for (int k = 0; k < kColumnHeld; ++k)
            if (k == at) w[k] = (w[k] & ~own) | (Word<Stored>::lowest & own);
    }

    FL_DEVICE bool sums_u() const { return kFactors || p.class_factors != ClassFactors::kNone; }
    static FL_DEVICE Row row_of(const Row& first, int j) { return {first.number + j, first.outer, first.inner + j}; }
    FL_DEVICE float u_of(const Row& row, int cls) const {
        return kFactors ? ClassFactorReader<float>(p, args, row)(cls) : 1.0f;
    }

    FL_DEVICE void take_exponentials(const Words& w, const Column (&of)[n], const Row& row, const float (&pivot)[n],
                                     Exponentials& e, State (&state)[n]) {
#pragma unroll
        for (int j = 0; j < n; ++j) state[j] = {pivot[j], 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < kColumnHeld; ++k) {
            float z[n];
            Word<Stored>::widen(w[k], z);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const Exponential<Stored> exponential(pivot[j]);
                const float x = exponential(z[j]);
                state[j].sum += x;
                if constexpr (!kAgain) e[k][j] = x;
                if (sums_u() && k < count && of[j].reads() && !(is_apart(of[j]) && begin + k == of[j].cls))
                    state[j].add(exponential.distance(z[j]), u_of(row_of(row, j), begin + k), 0.0f);
            }
        }
        if (args.is_saved) return;
        float sums[3 * n];
#pragma unroll
        for (int j = 0; j < n; ++j)
            sums[j] = state[j].sum, sums[n + j] = state[j].centred, sums[2 * n + j] = state[j].sum_u;
        if (sums_u()) {
            reduce(sums, Plus());
        } else {
            float only[n];
            for (int j = 0; j < n; ++j) only[j] = sums[j];
            reduce(only, Plus());
            for (int j = 0; j < n; ++j) sums[j] = only[j];
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
            state[j].sum = sums[j], state[j].centred = sums[n + j], state[j].sum_u = sums[2 * n + j];
            if (!is_apart(of[j])) continue;
            const Exponential<Stored> exponential(pivot[j]);
            state[j].add(exponential.distance(of[j].target_logit), sums_u() ? u_of(row_of(row, j), of[j].cls) : 0.0f,
                         exponential(of[j].target_logit));
        }
    }

    // The end of each column, by one of its threads.
    FL_DEVICE void find_coefficients(const Column (&of)[n], const Row& row, const float (&pivot)[n],
                                     const State (&state)[n], Coefficients<float> (&c)[n]) {
        __shared__ Coefficients<float> of_column[n][kWarp];
#pragma unroll
        for (int j = 0; j < n; ++j) {
            c[j] = {pivot[j], 0.0f, 0.0f, 0.0f};
            if (args.is_saved && of[j].reads()) c[j] = saved_coefficients<float>(p, row_of(row, j));
            if (args.is_saved || part != j % args.plan.lanes) continue;
            if (of[j].reads()) {
                const Exponential<Stored> exponential(pivot[j]);
                c[j] = end.finish(row_of(row, j), Target{of[j].cls, false}, of[j].target_logit,
                                  exponential.distance(of[j].target_logit), exponential(of[j].target_logit),
                                  exponential.log(state[j].sum), state[j], true);
                c[j].scale(share);
            } else if (of[j].exists()) {
                end.ignore(row_of(row, j), true);
            }
            of_column[j][lane] = c[j];
        }
        if (args.is_saved || args.plan.lanes == 1) return;
        __syncthreads();  // of_column is written again after one more barrier
#pragma unroll
        for (int j = 0; j < n; ++j) c[j] = of_column[j][lane];
    }

    FL_DEVICE void write(const Column (&of)[n], const Row& row, const float (&pivot)[n], const Words& w,
                         const Exponentials& e, const Coefficients<float> (&c)[n]) const {
        if (!of[0].exists()) return;
        const std::int64_t next = p.grad_class_stride, beside = p.grad_stride.inner;
        Stored* const grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner) + begin * next;
        const bool is_whole = args.plan.is_paired && of[n - 1].exists();
        Stored* to = grad;
#pragma unroll
        for (int k = 0; k < kColumnHeld; ++k, to += next) {
            if (k >= count) continue;
            float g[n], z[n];
            Word<Stored>::widen(w[k], z);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                g[j] = c[j].alpha * (kAgain ? Exponential<Stored>(pivot[j])(z[j]) : e[k][j]);
                if (!kFactors || of[j].reads()) g[j] += c[j].gamma * u_of(row_of(row, j), begin + k);
            }
            const unsigned word = Word<Stored>::narrow(g);
            if (is_whole) {
                *reinterpret_cast<unsigned*>(to) = word;
            } else {
                Stored numbers[n];
                std::memcpy(numbers, &word, sizeof(word));
#pragma unroll
                for (int j = 0; j < n; ++j)
                    if (of[j].exists()) to[j * beside] = numbers[j];
            }
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const int at = of[j].cls - begin;
            if (!of[j].reads() || static_cast<unsigned>(at) >= static_cast<unsigned>(count)) continue;
            grad[at * next + j * beside] = to_stored<Stored>(c[j].target_grad);
        }
    }

    // Over the warps of the block, for all of them.
    template <int m, class Combine>
    FL_DEVICE void reduce(float (&x)[m], Combine combine) {
        const int parts = args.plan.lanes;
        if (parts == 1) return;
        __shared__ float of_thread[2][m][kMostColumnThreads];
        turn ^= 1;  // who is late reads one half while others write to the other
#pragma unroll
        for (int i = 0; i < m; ++i) of_thread[turn][i][threadIdx.x] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < m; ++i) {
            x[i] = of_thread[turn][i][lane];
            for (int other = 1; other < parts; ++other) x[i] = combine(x[i], of_thread[turn][i][lane + other * kWarp]);
        }
    }

    const RegisterArgs& args;
    const RowProblem& p;
    RowEnd<float> end;
    const float bias, share;
    const int lane, part, begin, count;
    int turn = 0;
};

template <class Stored, bool kFactors>
__global__ void __launch_bounds__(kMostColumnThreads, 2) softmax_in_columns(const __grid_constant__ RegisterArgs args) {
    const RowProblem& p = args.problem;
    if (args.is_saved && is_already_written<float>(p)) return;
    LossSums sums{0, 0};
    Columns<Stored, kFactors> columns(args, sums);
    constexpr int at_once = kWarp * Word<Stored>::count;
    const std::int64_t of_image = (p.inner + at_once - 1) / at_once, all = of_image * p.outer;
    for (std::int64_t number = blockIdx.x; number < all; number += gridDim.x) {
        const std::int64_t outer = p.outer == 1 ? 0 : number / of_image;
        columns.run(outer, (number - outer * of_image) * at_once);
    }
    write_loss(args, sums);
}

}  // namespace

template <class Stored, bool kFactors>
cudaError_t enqueue_columns(RegisterArgs& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    constexpr std::int64_t at_once = kWarp * Word<Stored>::count;
    return launch_all_resident(&softmax_in_columns<Stored, kFactors>, {args.plan.threads, 0, 1},
                               p.outer * ((p.inner + at_once - 1) / at_once), stream, args);
}

#define FL_COLUMNS(Stored)                                                            \
    template cudaError_t enqueue_columns<Stored, false>(RegisterArgs&, cudaStream_t); \
    template cudaError_t enqueue_columns<Stored, true>(RegisterArgs&, cudaStream_t);
FL_COLUMNS(float)
FL_COLUMNS(Half)
FL_COLUMNS(BFloat16)

}  // namespace fused_losses::cuda
