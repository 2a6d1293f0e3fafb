// Softmax losses of which more is asked than the loss of one label: statistics, and shares of all classes, where rows
// fit into the registers of register_row.cuh, and all the rest (label_row.cuh). As in multi_reduction.cuh a row is read
// once: until its gradient is written it stays with the threads that share it, in shared memory, as floats whatever its
// dtype. Longer rows are read again in each pass.
#include "cuda/label_row.cuh"

namespace fused_losses::cuda {
namespace {

template <bool kShares>
__global__ void __launch_bounds__(kTileThreads, 4) labels_in_tiles(const __grid_constant__ RegisterArgs args) {
    work_on_tiles<LabelRow<float, true, kShares>>(args);
}

template <class A, bool kKeeps, bool kShares>
__global__ void __launch_bounds__(kKeeps ? kMostColumnThreads : kBlock, 1)
    labels_of_rows(const __grid_constant__ PlannedArgs<A> args) {
    work_on_rows<A, LabelRow<A, kKeeps, kShares>>(args);
}

template <class A, bool kShares>
cudaError_t enqueue_any_rows(PlannedArgs<A>& args, cudaStream_t stream) {
    args.plan = plan_any_rows(args.problem, LabelRow<A, false, kShares>::n);
    return launch_rows_resident(&labels_of_rows<A, false, kShares>, args, stream);
}

template <bool kShares>
cudaError_t enqueue_of(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.dtype == Dtype::kFloat64) {
        PlannedArgs<double> args(p, out);
        args.sums_u = label_sums_u(p);
        return enqueue_any_rows<double, kShares>(args, stream);
    }
    RegisterArgs args(p, out);
    args.sums_u = label_sums_u(p);
    const cudaError_t error = launch_kept<RegisterArgs>(
        {&labels_in_tiles<kShares>, &labels_of_rows<float, true, kShares>, LabelRow<float, true, kShares>::n}, args,
        stream);
    return error == kDoesNotFit ? enqueue_any_rows<float, kShares>(args, stream) : error;
}

bool is_for_registers(const RowProblem& p) {
    if (p.class_factors == ClassFactors::kClassLosses) return true;
    const bool has_bias = p.logit_bias != 0 || p.logit_bias_device;
    return p.argmax && !p.other_target && !has_bias && !(p.grad && p.upstream) &&
           kind_of(p) != KernelKind::kReadFactors;
}

// Statistics beside the loss of one label, or shares of all classes, of rows that fit into registers.
template <class Stored>
cudaError_t enqueue_rows_in_registers(RegisterArgs& args, cudaStream_t stream) {
    const bool has_shares = args.problem.class_factors == ClassFactors::kClassLosses;
    args.sums_u = label_sums_u(args.problem);
    args.take_direction(Direction::kForward);
    return launch_held(
        args, has_shares ? KernelKind::kReadFactors : KernelKind::kStatistics,
        [&] { return enqueue_tiles<Stored>(args, stream); }, [] { return kDoesNotFit; },
        [&] { return enqueue_direct<Stored>(args, stream); });
}

cudaError_t enqueue_in_registers(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.dtype == Dtype::kFloat64 || !is_for_registers(p)) return kDoesNotFit;
    RegisterArgs args(p, out);
    return with_stored<float>(p.dtype, [&]<class Stored>() { return enqueue_rows_in_registers<Stored>(args, stream); });
}

// The weights of the rows' labels, of which there are two where each has a denominator. Where each row has a lam, its
// weights are parts of one denominator.
template <class A>
__global__ void __launch_bounds__(kBlock) sum_weights(const __grid_constant__ RowArgs<A> args) {
    let_next_kernel_begin();
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;  // the next kernel will find that it has nothing to do
    LossSums sums{0, 0};
    const std::int64_t step = std::int64_t(gridDim.x) * kBlock, rows = p.rows();
    std::int64_t number = std::int64_t(blockIdx.x) * kBlock + threadIdx.x;
    if (!args.is_weighted && !p.other_target && p.target) {
        constexpr int at_once = 4;  // labels on their way
        for (; number < rows; number += at_once * step) {
            LoadedLabel labels[at_once];
#pragma unroll
            for (int i = 0; i < at_once; ++i)
                if (const std::int64_t at = number + i * step; at < rows) labels[i] = load_label(p, row_at(p, at));
#pragma unroll
            for (int i = 0; i < at_once; ++i)
                if (number + i * step < rows && class_or(-1, p, labels[i].index(p.index_type)) >= 0) sums.value += 1.0;
        }
    }
    for (; number < rows; number += step) {
        const Row row = row_at(p, number);
        const Labels labels = labels_of<A>(p, row);
        const auto weight = [&](int k) {
            if (labels.of[k].ignored) return 0.0;
            const A lam = p.lam ? lam_of_label<A>(p, row, k) : A(1);
            return static_cast<double>(lam * class_weight_of<A>(p, labels.of[k]) * sample_weight_of<A>(p, row));
        };
        sums.add({weight(0), weight(1)});
    }
    if (!sum_over_grid(sums, args.out)) return;
    A* const denominators = static_cast<A*>(args.out.denominator);
    if (p.lam) sums.value = sums.weight = sums.value + sums.weight;
    denominators[0] = static_cast<A>(sums.value);
    if (p.other_target) denominators[1] = static_cast<A>(sums.weight);
}

}  // namespace

bool is_about_labels(const RowProblem& p) {
    return p.argmax || p.other_target || p.class_factors == ClassFactors::kClassLosses || (p.grad && p.upstream);
}

cudaError_t enqueue_labels(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (const cudaError_t error = enqueue_in_registers(p, out, stream); error != kDoesNotFit) return error;
    return p.class_factors == ClassFactors::kClassLosses ? enqueue_of<true>(p, out, stream)
                                                         : enqueue_of<false>(p, out, stream);
}

cudaError_t enqueue_denominators(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    constexpr std::int64_t rows_per_block = 4 * kBlock;  // as many as a thread has on their way
    const auto run = [&](auto kernel, const auto& args) {
        return launch_over_rows(kernel, p.rows(), rows_per_block, stream, args);
    };
    if (p.dtype == Dtype::kFloat64) return run(sum_weights<double>, RowArgs<double>(p, out));
    return run(sum_weights<float>, RowArgs<float>(p, out));
}

}  // namespace fused_losses::cuda
