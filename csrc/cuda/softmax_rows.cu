// Softmax losses of rows of any length that lie anyhow, read once for the sums and once for the gradient; and the
// choice of a kernel for all others.
#include "cuda/row_end.cuh"
#include "cuda/row_part.cuh"

namespace fused_losses::cuda {
namespace {

// One row, by all threads of the team.
template <class A>
class AnyRow {
public:
    FL_DEVICE AnyRow(const PlannedArgs<A>& a, const Row& r, const Target& t, const ClassesOfThread& c, bool exists)
        : args(a),
          p(a.problem),
          row(r),
          target(t),
          place(place_of(p, row)),
          classes(c),
          count(exists && !target.ignored ? classes.count : 0),
          bias(target.cls < 0 ? A(0) : bias_of(a)),
          factor(p, a, row) {}

    FL_DEVICE SoftmaxState<A> sums() const {
        auto state = SoftmaxState<A>::empty();
        each_few([&](int k, A(&z)[kAtOnce]) {
            A u[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) u[i] = k + i < count ? u_of(class_at(k + i)) : A(0);
            state.push(z, u);
        });
        return state;
    }

    FL_DEVICE A target_logit() const {
        return target.cls < 0 ? A(0) : read_logit<A>(p.dtype, place, target.cls) + bias;
    }

    FL_DEVICE void write_gradient(const Coefficients<A>& c) const {
        each_few([&](int k, A(&z)[kAtOnce]) {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int cls = class_at(k + i);
                if (k + i < count) z[i] = c.of_exponential(math::exp(z[i] - c.max), u_of(cls), cls == target.cls);
            }
            write(k, z);
        });
    }

    FL_DEVICE void write_zeros() const {
        const A zeros[kAtOnce] = {};
        for (int k = 0; k < classes.count; k += kAtOnce) write(k, zeros);
    }

private:
    FL_DEVICE int class_at(int k) const { return classes.first + k * classes.step; }
    FL_DEVICE A u_of(int cls) const { return p.class_factors == ClassFactors::kNone ? A(0) : factor(cls); }

    template <class Body>
    FL_DEVICE void each_few(Body body) const {
#pragma unroll 1
        for (int k = 0; k < count; k += kAtOnce) {
            A z[kAtOnce];
            read_logits(p.dtype, place, classes, k, count, z);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (class_at(k + i) == target.cls) z[i] += bias;
            body(k, z);
        }
    }

    FL_DEVICE void write(int begin, const A (&g)[kAtOnce]) const {
        with_stored<A>(p.dtype, [&]<class Stored>() {
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                if (begin + i < classes.count)
                    *reinterpret_cast<Stored*>(place.to + class_at(begin + i) * place.to_step) =
                        to_stored<Stored>(g[i]);
        });
    }

    const PlannedArgs<A>& args;
    const RowProblem& p;
    const Row row;
    const Target target;
    const RowPlace place;
    const ClassesOfThread classes;
    const int count;
    const A bias;
    const ClassFactorReader<A> factor;
};

template <class A>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 8 ? 1 : 2)
    softmax_of_rows(const __grid_constant__ PlannedArgs<A> args) {
    const RowProblem& p = args.problem;
    if (is_already_written<A>(p)) return;
    RowTeam<A, true> team(args.plan);
    LossSums sums{0, 0};
    RowEnd<A> end(args, sums);
    const ClassesOfThread classes(0, static_cast<int>(p.num_classes), team.lane, team.threads);
    const std::int64_t rows = p.rows();
    for (std::int64_t first = team.first(); first < rows; first += team.step()) {
        const std::int64_t number = first + team.place();
        const bool exists = number < rows;
        const Row row = row_at(p, exists ? number : first);
        const Target target = exists ? target_of(p, row) : Target{0, true};
        const AnyRow<A> mine(args, row, target, classes, exists);
        auto state = SoftmaxState<A>::empty();
        if (!args.is_saved) {
            state = mine.sums();
            reduce_team(team, state);
        }
        if (!exists) continue;
        if (target.ignored) {
            if (!args.is_saved) end.ignore(row, team.leads);
            if (p.grad) mine.write_zeros();
            continue;
        }
        Coefficients<A> coefficients;
        if (args.is_saved) {
            coefficients = saved_coefficients<A>(p, row);
        } else {
            const A target_logit = mine.target_logit();
            const A distance = target_logit - state.max;
            const TargetLogit<A> logit{target_logit, distance, math::exp(distance)};
            coefficients = end.finish(row, target, logit, math::log(state.sum), state, team.leads);
        }
        if (p.grad) mine.write_gradient(coefficients);
    }
    write_loss(args, sums);
}

template <class A>
cudaError_t enqueue_any_rows(PlannedArgs<A>& args, cudaStream_t stream) {
    args.plan = plan_any_rows(args.problem, 0);
    return launch_rows_resident(&softmax_of_rows<A>, args, stream);
}

template <class Stored>
cudaError_t enqueue_of(const RowProblem& p, const LossOutput& out, Direction direction, cudaStream_t stream) {
    PlannedArgs<acc_t<Stored>> args(p, out);
    args.take_direction(direction);
    if constexpr (!kIsForChecking<Stored>) {
        // Backward from stats is the business of kernels that do it for u_j of 1 as well.
        KernelKind kind = kind_of(p);
        if (args.is_saved && kind == KernelKind::kNoFactors) kind = KernelKind::kUnitFactors;
        const cudaError_t error = launch_held(
            args, kind, [&] { return enqueue_tiles<Stored>(args, stream); },
            [&] { return enqueue_columns<Stored>(args, stream); },
            [&] { return enqueue_direct<Stored>(args, stream); });
        if (error != kDoesNotFit) return error;
    }
    return enqueue_any_rows(args, stream);
}

cudaError_t enqueue(const RowProblem& p, const LossOutput& out, Direction direction, cudaStream_t stream) {
    return visit_dtype(p.dtype, [&]<class Stored>() { return enqueue_of<Stored>(p, out, direction, stream); });
}

}  // namespace

cudaError_t enqueue_forward(const RowProblem& p, const LossOutput& out, cudaStream_t stream) {
    if (p.rows() == 0 && !out.loss) return cudaSuccess;
    return is_about_labels(p) ? enqueue_labels(p, out, stream) : enqueue(p, out, Direction::kForward, stream);
}

cudaError_t enqueue_gradient(const RowProblem& p, cudaStream_t stream) {
    return enqueue_backward(p, [&](const RowProblem& of, Direction to) { return enqueue(of, {}, to, stream); });
}

}  // namespace fused_losses::cuda
