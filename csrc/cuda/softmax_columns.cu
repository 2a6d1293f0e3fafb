// Softmax losses of rows that lie side by side, such as the pixels of NCHW: a lane has neighbouring rows, as many as
// four bytes hold, and some classes of them in registers; the warps of a block share the classes. So all accesses of a
// warp are to neighbours, and packed numbers are of different rows. Forward with its gradient, or backward alone.
#include "cuda/packed.cuh"
#include "cuda/row_end.cuh"
#include "cuda/row_team.cuh"

namespace fused_losses::cuda {
namespace {

constexpr int kWarp = 32;

// Some numbers of a thread, to be moved at once.
template <class T, int m>
struct alignas(m % 4 == 0   ? 16
               : m % 2 == 0 ? 8
                            : 4) Numbers {
    T of[m];
};

template <class Stored, KernelKind kKind, int kHeld>
class Columns {
    static constexpr int n = Word<Stored>::count;
    static constexpr int kAlways = ColumnKernel{kKind, kHeld}.always();
    static constexpr float kLowest = -std::numeric_limits<float>::infinity();
    static constexpr bool kReadsU = kKind == KernelKind::kReadFactors;
    // Of two columns there is no room for the exponentials, and they are one instruction then; else they take the
    // place of their logits.
    static constexpr bool kRecomputes = n == 2;
    static constexpr int kSums = kKind == KernelKind::kNoFactors ? 1 : kReadsU ? 3 : 2;
    using Words = unsigned[kHeld];
    using State = SoftmaxState<float>;

public:
    struct Shared {
        static constexpr int kMostParts = kMostColumnThreads / kWarp;
        unsigned top[kMostParts][kWarp];
        Numbers<float, kSums * n> sums[kMostParts][kWarp];
        Coefficients<float> coefficients[n][kWarp];
    };

    FL_DEVICE Columns(const RegisterArgs& a, LossSums& sums, Shared& s)
        : args(a),
          p(a.problem),
          shared(s),
          end(a, sums),
          bias(bias_of(a)),
          lane(threadIdx.x % kWarp),
          part(threadIdx.x / kWarp),
          begin(part * static_cast<int>(p.num_classes) / a.plan.lanes),
          count((part + 1) * static_cast<int>(p.num_classes) / a.plan.lanes - begin) {}

    // The columns from `first` on, of an image of the problem's `inner`, and those that come next; next_outer: -1 if
    // there are none. For all threads of the block.
    FL_DEVICE void run(std::int64_t outer, std::int64_t first, std::int64_t next_outer, std::int64_t next_first) {
        const Place place{outer, first + lane * n};
        LoadedLabel labels[n];
        Column of[n];
#pragma unroll
        for (int j = 0; j < n; ++j)
            if (p.target && place.inner + j < p.inner) labels[j] = load_label(p, row_of(place, j));
#pragma unroll
        for (int j = 0; j < n; ++j) of[j] = column(place.inner + j, labels[j]);
        // Who has nothing to read reads what others do.
        const bool reads = of[0].reads() || of[n - 1].reads();
        const Stored* const logits = as<Stored>(p.logits) + p.logits_stride.at(outer, reads ? place.inner : 0);
#pragma unroll
        for (int j = 0; j < n; ++j)
            if (of[j].cls >= 0)
                of[j].target_logit =
                    to_acc(logits[j * p.logits_stride.inner + of[j].cls * p.logits_class_stride]) + bias;
        Words w;
        read(logits, of, w);
        if (!kReadsU && next_outer >= 0) prefetch_columns(next_outer, next_first);
        float pivot[n];
        find_pivots(w, of, place, pivot);
        State state[n];
        take_exponentials(w, of, place, pivot, state);
        Coefficients<float> c[n];
        find_coefficients(of, place, pivot, state, c);
        if (p.grad && of[0].exists()) write(of, place, pivot, w, c);
    }

private:
    // A lane asks for a class of the warp's, whose neighbouring columns are 128 bytes; and for as many of the targets.
    FL_DEVICE void prefetch_columns(std::int64_t outer, std::int64_t first) const {
        if (lane < count)
            prefetch(as<Stored>(p.logits) + p.logits_stride.at(outer, first) + (begin + lane) * p.logits_class_stride);
        const std::int64_t label = bytes_of(p.index_type), apart = p.target_stride.inner * label;
        if (part == 0 && p.target && 128 * lane < (min(std::int64_t(kWarp * n), p.inner - first) - 1) * apart + label)
            prefetch(as<char>(p.target) + p.target_stride.at(outer, first) * label + 128 * lane);
    }

    // Of a lane's first column: in few registers, as all that stays.
    struct Place {
        std::int64_t outer, inner;
    };
    struct Column {
        static constexpr int kIgnored = -2, kMissing = -3;
        int cls;
        float target_logit;

        FL_DEVICE bool exists() const { return cls != kMissing; }
        FL_DEVICE bool reads() const { return cls > kIgnored; }
    };

    FL_DEVICE Column column(std::int64_t inner, const LoadedLabel& label) const {
        if (inner >= p.inner) return {Column::kMissing, 0.0f};
        return {p.target ? class_or(Column::kIgnored, p, label.index(p.index_type)) : -1, 0.0f};
    }
    // With a bias, the target's logit is not that of the column: it counts as -inf there, for itself after the sums.
    FL_DEVICE bool is_apart(const Column& of) const { return bias != 0.0f && of.cls >= 0; }
    // Kernels that sum no u_j are for forward alone.
    FL_DEVICE bool is_saved() const { return kKind != KernelKind::kNoFactors && args.is_saved; }
    FL_DEVICE bool has(int k) const { return k < kAlways || k < count; }
    static FL_DEVICE unsigned half(int j) { return n == 1 ? 0xffffffffu : 0xffffu << 16 * j; }
    FL_DEVICE Row row_of(const Place& first, int j) const {
        return {first.outer * p.inner + first.inner + j, first.outer, first.inner + j};
    }
    FL_DEVICE float u_of(const Row& row, int cls) const {
        return kReadsU ? ClassFactorReader<float>(p, args, row)(cls) : 1.0f;
    }
    template <class Body>
    FL_DEVICE void each_class(Body body) const {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) body(k);
    }

    // Of class k. One instruction, where the compiler does not see that there are more of them: it would make each from
    // the one before by an addition, which are two.
    template <class Byte>
    static FL_DEVICE Byte* class_at(Byte* first, unsigned step, int k) {
        return first + std::uint64_t(as_new(step)) * static_cast<unsigned>(k);
    }

    // What is not read is -inf.
    FL_DEVICE void read(const Stored* x, const Column (&of)[n], Words& w) const {
        const char* const from = reinterpret_cast<const char*>(x) + std::uint64_t(args.plan.logits_step) * begin;
        const auto at = [&](int k) { return class_at(from, args.plan.logits_step, k); };
        if (n == 1 || args.plan.is_paired) {
            each_class(
                [&](int k) { w[k] = has(k) ? *reinterpret_cast<const unsigned*>(at(k)) : Word<Stored>::lowest; });
        } else {
            const std::int64_t beside = of[n - 1].exists() ? p.logits_stride.inner : 0;
            each_class([&](int k) {
                const auto* const each = reinterpret_cast<const Stored*>(at(k));
                w[k] = has(k) ? Word<Stored>::of(each[0], each[beside]) : Word<Stored>::lowest;
            });
        }
        unsigned taken = 0;
#pragma unroll
        for (int j = 0; j < n; ++j)
            if (of[j].reads()) taken |= half(j);
        each_class([&](int k) { w[k] = (w[k] & taken) | (Word<Stored>::lowest & ~taken); });
        if (bias == 0.0f) return;
#pragma unroll
        for (int j = 0; j < n; ++j)
            each_class([&](int k) {
                if (k + begin == of[j].cls) w[k] = (w[k] & ~half(j)) | (Word<Stored>::lowest & half(j));
            });
    }

    FL_DEVICE void find_pivots(const Words& w, const Column (&of)[n], const Place& place, float (&pivot)[n]) const {
        if (is_saved()) {
#pragma unroll
            for (int j = 0; j < n; ++j) pivot[j] = of[j].reads() ? as<float>(p.stats)[row_of(place, j).number] : 0.0f;
            return;
        }
        unsigned top = w[0];
#pragma unroll
        for (int k = 1; k < kHeld; ++k) top = Word<Stored>::larger(top, w[k]);
        if (const int parts = args.plan.lanes; parts > 1) {
            shared.top[part][lane] = top;
            __syncthreads();
            for (int other = 0; other < parts; ++other) top = Word<Stored>::larger(top, shared.top[other][lane]);
        }
        Word<Stored>::widen(top, pivot);
#pragma unroll
        for (int j = 0; j < n; ++j) {
            if (is_apart(of[j])) pivot[j] = std::fmax(pivot[j], of[j].target_logit);
            if (pivot[j] == kLowest) pivot[j] = 0.0f;
        }
    }

    FL_DEVICE void take_exponentials(Words& w, const Column (&of)[n], const Place& place, const float (&pivot)[n],
                                     State (&state)[n]) const {
#pragma unroll
        for (int j = 0; j < n; ++j) state[j] = {pivot[j], 0.0f, 0.0f, 0.0f};
        each_class([&](int k) {
            float z[n];
            Word<Stored>::widen(w[k], z);
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const Exponential<Stored> exponential(pivot[j]);
                const float e = exponential(z[j]);
                if constexpr (kKind != KernelKind::kNoFactors)
                    if (!is_saved() && has(k) && of[j].reads() && !(is_apart(of[j]) && begin + k == of[j].cls))
                        state[j].add(exponential.distance(z[j]), u_of(row_of(place, j), begin + k), 0.0f);
                state[j].sum += e;
                z[j] = e;
            }
            if constexpr (!kRecomputes) w[k] = Word<Stored>::narrow(z);
        });
    }

    // Over the classes of all warps.
    FL_DEVICE void gather(int j, State& state) const {
        const int parts = args.plan.lanes;
        if (parts == 1) return;
        float sums[kSums] = {};
        for (int other = 0; other < parts; ++other)
#pragma unroll
            for (int i = 0; i < kSums; ++i) sums[i] += shared.sums[other][lane].of[i * n + j];
        state.sum = sums[0];
        if constexpr (kKind != KernelKind::kNoFactors) state.centred = sums[1];
        if constexpr (kReadsU) state.sum_u = sums[2];
    }

    // The end of each column, by one of its threads.
    FL_DEVICE void find_coefficients(const Column (&of)[n], const Place& place, const float (&pivot)[n],
                                     State (&state)[n], Coefficients<float> (&c)[n]) {
        const int parts = args.plan.lanes;
        if (is_saved()) {
#pragma unroll
            for (int j = 0; j < n; ++j) {
                c[j] = {pivot[j], 0.0f, 0.0f, 0.0f};
                if (of[j].reads()) c[j] = saved_coefficients<float>(p, row_of(place, j));
            }
            return;
        }
        if (parts > 1) {
            Numbers<float, kSums * n> own;
#pragma unroll
            for (int j = 0; j < n; ++j) {
                const float sums[] = {state[j].sum, state[j].centred, state[j].sum_u};
                for (int i = 0; i < kSums; ++i) own.of[i * n + j] = sums[i];
            }
            shared.sums[part][lane] = own;
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < n; ++j) {
            if (part != j % parts) continue;
            gather(j, state[j]);
            c[j] = {pivot[j], 0.0f, 0.0f, 0.0f};
            if (of[j].reads()) {
                finish(of[j], row_of(place, j), pivot[j], state[j], c[j]);
            } else if (of[j].exists()) {
                end.ignore(row_of(place, j), true);
            }
            if (parts > 1) shared.coefficients[j][lane] = c[j];
        }
        if (parts == 1) return;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < n; ++j) c[j] = shared.coefficients[j][lane];
    }

    FL_DEVICE void finish(const Column& of, const Row& row, float pivot, State& state, Coefficients<float>& c) {
        const Exponential<Stored> exponential(pivot);
        const float distance = exponential.distance(of.target_logit), target_e = exponential(of.target_logit);
        if constexpr (kKind == KernelKind::kUnitFactors) state.sum_u = static_cast<float>(p.num_classes);
        if (is_apart(of)) {
            const float u = kReadsU ? u_of(row, of.cls) : 0.0f;
            state.add(distance, kKind == KernelKind::kUnitFactors ? 1.0f : u, target_e);
            if constexpr (kKind == KernelKind::kUnitFactors) state.sum_u -= 1.0f;
        }
        const TargetLogit<float> logit{of.target_logit, distance, target_e};
        c = end.template finish<kKind>(row, Target{of.cls, false}, logit, exponential.log(state.sum), state, true);
    }

    FL_DEVICE void write(const Column (&of)[n], const Place& place, const float (&pivot)[n], const Words& w,
                         const Coefficients<float> (&c)[n]) const {
        Stored* const grad = static_cast<Stored*>(p.grad) + p.grad_stride.at(place.outer, place.inner);
        const std::int64_t beside = p.grad_stride.inner;
        char* const to = reinterpret_cast<char*>(grad) + std::uint64_t(args.plan.grad_step) * begin;
        const auto write_words = [&](auto store) {
            each_class([&](int k) {
                float z[n], g[n];
                Word<Stored>::widen(kRecomputes ? as_new(w[k]) : w[k], z);
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    g[j] = c[j].alpha * (kRecomputes ? Exponential<Stored>(pivot[j])(z[j]) : z[j]);
                    if constexpr (kKind != KernelKind::kNoFactors)
                        if (has(k) && of[j].reads()) g[j] += c[j].gamma * u_of(row_of(place, j), begin + k);
                }
                const unsigned word = Word<Stored>::narrow(g);
                if (has(k)) store(class_at(to, args.plan.grad_step, k), word);
            });
        };
        if (n == 1 || args.plan.is_paired)
            write_words([](char* at, unsigned word) { *reinterpret_cast<unsigned*>(at) = word; });
        else
            write_words([&](char* at, unsigned word) {
                Stored each[n];
                std::memcpy(each, &word, sizeof word);
                reinterpret_cast<Stored*>(at)[0] = each[0];
                if (of[n - 1].exists()) reinterpret_cast<Stored*>(at)[beside] = each[n - 1];
            });
#pragma unroll
        for (int j = 0; j < n; ++j) {
            const int at = of[j].cls - begin;
            if (of[j].cls < 0 || static_cast<unsigned>(at) >= static_cast<unsigned>(count)) continue;
            grad[of[j].cls * p.grad_class_stride + j * beside] = to_stored<Stored>(c[j].target_grad);
        }
    }

    const RegisterArgs& args;
    const RowProblem& p;
    Shared& shared;  // each part of it is read between barriers that no thread passes before its other use
    const RowEnd<float> end;
    const float bias;
    const int lane, part, begin, count;
};

template <class Stored, KernelKind kKind, int kHeld>
__global__ void __launch_bounds__(kMostColumnThreads, 2) softmax_in_columns(const __grid_constant__ RegisterArgs args) {
    const RowProblem& p = args.problem;
    if (is_already_written<float>(p)) return;
    using Worker = Columns<Stored, kKind, kHeld>;
    __shared__ typename Worker::Shared shared;
    __shared__ LossSums of_thread[kMostColumnThreads];
    LossSums& sums = of_thread[threadIdx.x];  // registers have other uses
    sums = {0, 0};
    wait_for_kernel_before();
    Worker columns(args, sums, shared);
    constexpr int at_once = kWarp * Word<Stored>::count;
    const std::int64_t of_image = divide_up(p.inner, at_once), all = of_image * p.outer;
    for (std::int64_t number = blockIdx.x; number < all; number += gridDim.x) {
        const std::int64_t following = number + gridDim.x;
        const std::int64_t outer = p.outer == 1 ? 0 : number / of_image, next = p.outer == 1 ? 0 : following / of_image;
        columns.run(outer, (number - outer * of_image) * at_once, following < all ? next : -1,
                    (following - next * of_image) * at_once);
    }
    write_loss(args, sums);
}

}  // namespace

template <class Stored>
cudaError_t enqueue_columns(RegisterArgs& args, cudaStream_t stream) {
    const RowProblem& p = args.problem;
    constexpr std::int64_t at_once = kWarp * Word<Stored>::count;
    const std::int64_t wanted = p.outer * divide_up(p.inner, at_once);
    return launch_planned<kColumnKernels>(args.plan, [&]<ColumnKernel kernel>() {
        return launch_all_resident(&softmax_in_columns<Stored, kernel.kind, kernel.held>,
                                   {args.plan.threads, 0, 1, args.out.follows_weights}, wanted, stream, args);
    });
}

#define FL_COLUMNS(Stored) template cudaError_t enqueue_columns<Stored>(RegisterArgs&, cudaStream_t);
FL_COLUMNS(float)
FL_COLUMNS(Half)
FL_COLUMNS(BFloat16)

}  // namespace fused_losses::cuda
