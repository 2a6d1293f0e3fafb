// Forward of losses of several passes (core/pass_loss.h): each row's value, its share of the denominator and its state,
// the sums over all rows, on demand the gradient. Passes after the first find the row in shared memory or in cache.
#pragma once

#include "cuda/pass_row.cuh"
#include "cuda/pixel_tile.cuh"
#include "cuda/residence.cuh"

namespace fused_losses::cuda {

// Of one row, by all threads that share it; target_logit includes the bias.
template <class Loss, class Stored, class Team>
FL_DEVICE typename Loss::template State<acc_t<Stored>> run_passes(const RowArgs<acc_t<Stored>>& args, Team& team,
                                                                  const RowSlice<Stored>& slice, int target,
                                                                  acc_t<Stored> target_logit) {
    using A = acc_t<Stored>;
    RowInputs<A> row{A(0), target_logit, margin_of(args, target), A(args.problem.num_classes)};
    // body(z, class) for the classes of this thread
    const auto each_class = [&](auto body) {
        team.template walk<kBytesInPass<Loss, Stored>>(
            slice.logits, slice.count, slice.stride == 1, [&]<int kCount>(Count<kCount>, int c) {
                A z[kCount];
                load(slice.logits + c * slice.stride, z);
                const int cls = slice.first + c;
#pragma unroll
                for (int k = 0; k < kCount; ++k) body(cls + k == target ? row.target_logit : z[k], cls + k);
            });
    };
    if constexpr (Loss::needs_max) {
        Numbers<A, 1> top{{-std::numeric_limits<A>::infinity()}};
        each_class([&](A z, int) { top.v[0] = Larger{}(top.v[0], z); });
        team.reduce(top, Larger{});
        row.max = top.v[0];
    }
    auto state = Loss::begin(row, args.params);
    const int passes = Loss::passes(args.problem.params);
    for (int pass = 0; pass < passes; ++pass) {
        Numbers<A, Loss::num_sums> sums{};
        each_class([&](A z, int cls) {
            const auto term = term_at<Loss>(pass, state, z, margin_of(args, cls), cls == target, args.params);
#pragma unroll
            for (int i = 0; i < Loss::num_sums; ++i) sums.v[i] += term.v[i];
        });
        team.reduce(sums, Plus{});
        Sums<A, Loss::num_sums> all;
#pragma unroll
        for (int i = 0; i < Loss::num_sums; ++i) all.v[i] = sums.v[i];
        Loss::end_pass(pass, state, all, row, args.params);
    }
    return state;
}

// What comes out of the rows.
template <class A, class Loss>
struct RowEnd {
    using State = typename Loss::template State<A>;

    const RowArgs<A>& args;
    const A share;  // 1 / denominator of the gradient that forward writes
    LossSums sums{0, 0};

    FL_DEVICE explicit RowEnd(const RowArgs<A>& a) : args(a), share(written_share<A>(a.problem)) {}

    FL_DEVICE void record(const Row& row, A value, A weight, const State& state) {
        const RowProblem& p = args.problem;
        sums.add({static_cast<double>(value), static_cast<double>(weight)});
        if (p.row_values) static_cast<A*>(p.row_values)[row.number] = value;
        if (!p.stats) return;
        constexpr int count = kStateSize<State, A>;
        A numbers[count];
        std::memcpy(numbers, &state, sizeof(state));
        for (int k = 0; k < count; ++k) static_cast<A*>(p.stats)[k * p.rows() + row.number] = numbers[k];
    }

    // Returns what the row's gradient is multiplied by.
    FL_DEVICE A finish(const Row& row, const Target& target, const State& state, bool records) {
        const RowProblem& p = args.problem;
        const A value = Loss::value(state), weight = class_weight_of<A>(p, target) * sample_weight_of<A>(p, row);
        const bool counts = p.reduction != Reduction::kActiveMean || !(value <= A(0));  // NaN counts
        if (records) record(row, weight * value, counts ? weight : A(0), state);
        return weight * share;
    }
};

template <class Stored, class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, true>)
    forward(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    Group group(args.residence);
    RowEnd<A, Loss> end(args);
    RowReader<Stored, Group>(args, group)
        .for_each([&](const Row& row, const Target& target, const RowSlice<Stored>& slice, bool) {
            if (target.ignored) {  // for the whole group
                if (group.records()) end.record(row, A(0), A(0), {});
                if (p.grad) write_zeros(p, group, row, slice);
                return;
            }
            const A target_logit = logit_of(p, row, slice, target.cls) + bias_of(args);
            const auto state = run_passes<Loss>(args, group, slice, target.cls, target_logit);
            const A scale = end.finish(row, target, state, group.records());
            if (p.grad)
                write_pass_gradient<Loss>(args, group, slice, gradient_row<Stored>(p, row), p.grad_class_stride,
                                          target.cls, state, scale);
        });
    group.part_company();
    write_loss(args, end.sums);
}

template <class Stored, class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<acc_t<Stored>, true>)
    forward_by_thread(const __grid_constant__ RowArgs<acc_t<Stored>> args) {
    using A = acc_t<Stored>;
    const RowProblem& p = args.problem;
    RowEnd<A, Loss> end(args);
    PixelTiles<Stored>(args).for_each(
        [&](const Column& column, const Row& row, const Target& target, const RowSlice<Stored>& slice, bool exists) {
            // Threads that share pixels meet in run_passes, even those of pixels that are ignored.
            if (target.ignored && column.parts == 1) {
                if (!exists) return;
                end.record(row, A(0), A(0), {});
                if (p.grad) write_zeros(p, column, row, slice);
                return;
            }
            const A target_logit = to_acc(slice.logits[target.cls * slice.stride]) + bias_of(args);
            const auto state = run_passes<Loss>(args, column, slice, target.cls, target_logit);
            if (!exists) return;
            if (target.ignored) {
                if (column.records()) end.record(row, A(0), A(0), {});
                if (p.grad) write_zeros(p, column, row, slice);
                return;
            }
            const A scale = end.finish(row, target, state, column.records());
            if (p.grad)
                write_pass_gradient<Loss>(args, column, slice, gradient_row<Stored>(p, row), p.grad_class_stride,
                                          target.cls, state, scale);
        });
    write_loss(args, end.sums);
}

template <class Loss>
__global__ void __launch_bounds__(kBlock, kMinBlocks<float, Loss::needs_max>)
    forward_staged(const __grid_constant__ RowArgs<float> args) {
    __shared__ float memory[StagedTile::kSize];
    const RowProblem& p = args.problem;
    const StagedTile tile(memory, p);
    RowEnd<float, Loss> end(args);
    tile.for_each([&](std::int64_t first, int rows) {
        const int me = threadIdx.x;
        tile.read_logits(first, rows);
        __syncthreads();
        if (me < rows) {
            const Row row = row_at(p, first + me);
            const Target target = target_of(p, row);
            const RowSlice<float> slice = tile.slice(me);
            float* const x = tile.row(me);
            if (target.ignored) {
                end.record(row, 0.0f, 0.0f, {});
                for (int c = 0; c < p.num_classes; ++c) x[c] = 0;
            } else {
                const Alone alone;
                const auto state = run_passes<Loss>(args, alone, slice, target.cls, x[target.cls] + bias_of(args));
                const float scale = end.finish(row, target, state, true);
                if (p.grad) write_pass_gradient<Loss>(args, alone, slice, x, 1, target.cls, state, scale);
            }
        }
        if (!p.grad) return;
        __syncthreads();
        tile.write_gradient(first, rows);
    });
    write_loss(args, end.sums);
}

template <class Given>
cudaError_t enqueue_forward_of(const RowProblem& given, const LossOutput& out, cudaStream_t stream) {
    return dispatch_pass<Given>(given, [&]<class Stored>(const RowProblem& p) {
        using Loss = typename RunAs<Given>::type;
        RowArgs<acc_t<Stored>> args(p, out);
        const Regime regime = regime_of(p);
        if constexpr (!kIsForChecking<Stored>) {
            if (regime == Regime::kStaged)
                return launch_over_rows(forward_staged<Loss>, p.rows(), kBlock, stream, args);
            if (regime == Regime::kThread) return launch_pixels<Stored>(forward_by_thread<Stored, Loss>, args, stream);
        }
        return launch_rows<Stored>(forward<Stored, Loss>, threads_of(regime), args, stream);
    });
}

// In tempered_forward.cu, which is compiled at the same time as the others.
extern template cudaError_t enqueue_forward_of<BiTempered>(const RowProblem&, const LossOutput&, cudaStream_t);

}  // namespace fused_losses::cuda
