// A random problem for the CUDA kernels, run by cuda_emulation and compared with naive_losses.h.
#pragma once

#include "cuda/launch.h"
#include "cuda/register_plan.h"
#include "emulated_devices.h"
#include "expected_rows.h"
#include "naive_statistics.h"

#include <utility>

namespace fused_losses_test {

inline long gradients_of_bits = 0;  // that were compared

template <class Stored>
class CudaCase : ExpectedRows<Stored> {
    using Base = ExpectedRows<Stored>;
    using Base::any_layout, Base::for_rows, Base::ignored, Base::inputs, Base::set_strides, Base::target_of;
    using Base::class_weight, Base::logits, Base::random, Base::scalars, Base::shape, Base::soft, Base::mixes, Base::p,
        Base::name;
    using Base::compute_expected, Base::expected_of, Base::sample_weight_of, Base::may_be_zero;
    using typename Base::A, typename Base::P, typename Base::Inputs, typename Base::RowResult;

public:
    // more: whether it may be asked for more than the loss of one label; must_look: for row statistics.
    CudaCase(const Shape& s, int loss, const Params& params, Random& r, bool more = true, bool must_look = false)
        : Base(s, loss, params, r, more && !must_look), looks(must_look || (more && !soft && !mixes && r.one_in(3))) {
        if (looks && !is_multi_reduction_loss(loss)) p.stats_count = 0;
    }

    void test(const std::string& what) {
        choose_device();
        test(what, any_grad_layout());
    }

    // Rows that only a cluster of 16 blocks can hold.
    void test_large_cluster(const std::string& what) {
        choose_device_with_clusters();
        test(what + " by 16 blocks", any_grad_layout());
    }

    // Whether rows can stay in registers of kernels for these; and on a device with room for whatever is planned, of
    // which the gradient is written as the logits are read.
    bool is_for(cuda::KernelKind kind) const {
        if (logits.layout.begin == 0) return false;
        const bool of_competitors = p.loss == index_of(AllLosses{}, "hem") && p.params[1] > 0;
        if (is_multi_reduction(kind)) return !p.first_param || p.first_param_stride == 0 || !of_competitors;
        if (kind == cuda::KernelKind::kStatistics)
            return looks && p.logit_bias == 0 && !p.logit_bias_device &&
                   cuda::kind_of(p) != cuda::KernelKind::kReadFactors;
        const bool has_shares = p.class_factors == ClassFactors::kClassLosses;
        return !looks && !mixes && (has_shares ? cuda::KernelKind::kReadFactors : cuda::kind_of(p)) == kind;
    }
    void test_planned(const std::string& what) {
        choose_device_with_clusters();
        test(what + " as planned", logits.layout);
    }

    // Rows of the gradient begin `offset` elements further from a 16-byte boundary than those of the logits, which have
    // no gaps.
    void test_offset(const std::string& what, int offset) {
        Layout layout = logits.layout;
        layout.begin += offset;
        choose_device();
        test(what + ", gradient off by " + std::to_string(offset), layout);
    }

    void test_isolation(const std::string& what) {
        name = full_name(what);
        choose_device();
        Base::template check_isolation<Result>(any_grad_layout(), [&](Result& r) { run(r); });
    }

private:
    void test(const std::string& what, const Layout& grad_layout) {
        name = full_name(what);
        if (mixes) choose_label_denominators();
        const Inputs before = inputs();
        compute_expected();
        move_first_param();
        Result once(grad_layout, p), again(grad_layout, p);
        run(once);
        run(again);
        check(once == again, "%s: another order of threads gives other bits", name.c_str());
        check(before == inputs(), "%s: an input was written to", name.c_str());
        for_rows([&](std::int64_t o, std::int64_t i) {
            Base::compare_value(o, i, once.values.at(o, i));
            Base::compare_saved(once.stats, o, i);
            if (looks) compare_statistics(once, o, i);
            Base::compare_gradient(once.grad, "backward", o, i);
        });
        compare_reduction(once);
        test_gradient_of_forward(grad_layout);
        test_assumed_upstream(grad_layout);
        if (needs_of(p.loss).has_margin) test_gradient_of_bits(once);
        if (looks) test_statistics_of_odd_rows(grad_layout);
    }

    std::string full_name(const std::string& what) const {
        return what + (soft ? " soft" : "") + (mixes ? " mixed" : "") + (looks ? " with statistics" : "");
    }

    // A parameter that may be a tensor is read from memory half of the time; the number in its place is none then.
    void move_first_param() {
        const LossNeeds needs = needs_of(p.loss);
        if (!needs.tensor_param || needs.has_margin || p.class_factors == ClassFactors::kNone || random.one_in(2))
            return;
        first_param = A(p.params[0]);
        p.first_param = &first_param;
        p.params[0] = std::numeric_limits<double>::quiet_NaN();
    }
    A first_param = A(0);

    // In place of the factors of the CPU's kernels.
    void choose_label_denominators() {
        for (int k = 0; k < 2; ++k) {
            const A denominator = random.one_in(5) ? A(0) : A(random.uniform(1, 5));
            scalars.at(0, 0, 2 + k) = denominator;
            p.label_scale[k] = denominator == A(0) ? 0.0 : 1 / double(denominator);
        }
        p.label_denominators = &scalars.at(0, 0, 2);
    }

    struct Result : RowResult {
        Guarded<A> scalars;
        Guarded<double> scratch;
        Guarded<A> row_statistics;
        Guarded<std::int64_t> argmax;
        unsigned ticket = 0;

        Result(const Layout& grad, const RowProblem& p)
            : RowResult(grad, p),
              scalars(layout_of(Kind::kRows, 1, 3, 1)),
              scratch(layout_of(Kind::kRows, 1, cuda::kPartials, 1)),
              row_statistics(layout_of(Kind::kRows, 1, kRowStatistics * p.rows(), 1)),
              argmax(layout_of(Kind::kRows, 1, p.rows(), 1)) {}

        cuda::LossOutput output(bool mean) {
            void* const denominator = mean ? &scalars.at(0, 1) : nullptr;
            const bool own = cuda_emulation::one_in(2);  // the kernel's own ticket
            const int number = int(cuda_emulation::random() % cuda::kTickets);
            return {&scalars.at(0, 0), denominator, scratch.data(), own ? nullptr : &ticket, own ? number : 0};
        }
        bool operator==(const Result& other) const {
            return RowResult::operator==(other) && scalars == other.scalars && ticket == other.ticket &&
                   row_statistics == other.row_statistics && argmax == other.argmax;
        }
        bool only_elements_written() const {
            return RowResult::only_elements_written() && scalars.only_elements_written() &&
                   scratch.only_elements_written() && row_statistics.only_elements_written() &&
                   argmax.only_elements_written();
        }
    };

    void compare_statistics(Result& result, std::int64_t o, std::int64_t i) {
        std::vector<double> z;
        for (int c = 0; c < shape.classes; ++c) z.push_back(double(widen(logits.at(o, i, c))));
        const bool is_ignored = ignored(o, i);
        const NaiveStatistics want = statistics_of(z, is_ignored ? 0 : target_of(o, i), is_ignored);
        const std::int64_t row = o * p.inner + i;
        check(result.argmax.at(0, row) == want.argmax, "%s: argmax %lld, not %lld", name.c_str(),
              (long long)result.argmax.at(0, row), (long long)want.argmax);
        for (int k = 0; k < kRowStatistics; ++k) {
            const double got = double(result.row_statistics.at(0, k * p.rows() + row));
            check(close(got, want.v[k], P::computed), "%s: statistic %d: %.9g, not %.9g", name.c_str(), k, got,
                  want.v[k]);
        }
    }

    // Of rows with NaN, infinities and masked classes the losses are not finite, but statistics say why.
    void test_statistics_of_odd_rows(const Layout& grad_layout) {
        const double odd[] = {HUGE_VAL, -HUGE_VAL, std::nan("")};
        for_rows([&](std::int64_t o, std::int64_t i) {
            const bool all = random.one_in(8);
            const double z = odd[random.below(3)];
            for (int c = 0; c < shape.classes; ++c)
                if (all || random.one_in(int(shape.classes))) logits.at(o, i, c) = narrow<Stored>(A(z));
        });
        Result result(grad_layout, p);
        check(forward(with_outputs(result), result, true) == cudaSuccess, "%s: odd rows were not launched",
              name.c_str());
        for_rows([&](std::int64_t o, std::int64_t i) { compare_statistics(result, o, i); });
    }

    // The logits' own in half of the cases, so that rows can be read and written by vectors.
    Layout any_grad_layout() { return random.one_in(2) ? logits.layout : any_layout(); }

    bool has_mean() const { return p.reduction == Reduction::kMean || p.reduction == Reduction::kActiveMean; }

    // Another grid adds in another order, and so gives another loss.
    cudaError_t forward(const RowProblem& q, Result& result, bool any_grid) {
        shuffle_launches(any_grid);
        const cuda::LossOutput out = q.reduction == Reduction::kNone ? cuda::LossOutput{} : result.output(has_mean());
        return is_multi_reduction_loss(q.loss) ? cuda::enqueue_multi_reduction_forward(q, out, nullptr)
                                               : cuda::enqueue_forward(q, out, nullptr);
    }

    // Where forward has saved nothing it is forward again, for any upstream gradient.
    cudaError_t gradient(RowProblem q) {
        shuffle_launches(true);
        q.row_statistics = nullptr, q.argmax = nullptr;
        if (q.stats_count == 0) {
            if (!q.upstream) q.upstream = &one, q.upstream_stride = {};
            q.row_values = nullptr;
            return cuda::enqueue_forward(q, {}, nullptr);
        }
        return is_multi_reduction_loss(q.loss) ? cuda::enqueue_multi_reduction_gradient(q, nullptr)
                                               : cuda::enqueue_gradient(q, nullptr);
    }

    RowProblem with_outputs(Result& result) {
        RowProblem q = p;
        if (looks) q.row_statistics = result.row_statistics.data(), q.argmax = result.argmax.data();
        q.row_values = result.values.data();
        q.stats = p.stats_count > 0 ? result.stats.data() : nullptr;
        q.grad = result.grad.data() + result.grad_layout.begin;
        set_strides(result.grad_layout, q.grad_stride, q.grad_class_stride);
        return q;
    }

    // Forward with its sums, then the gradient, into a fresh result.
    void run(Result& result) {
        RowProblem q = with_outputs(result);
        void* const grad = std::exchange(q.grad, nullptr);
        check(forward(q, result, false) == cudaSuccess, "%s: forward was not launched", name.c_str());
        const RowResult after_forward = result;
        if (cuda::backward_recomputes(q)) q.stats = nullptr;
        q.grad = grad;
        check(gradient(q) == cudaSuccess, "%s: gradient was not launched", name.c_str());
        check(result.values == after_forward.values && result.stats == after_forward.stats,
              "%s: gradient changed what forward saved", name.c_str());
        shuffle_launches(false);
        cuda::LossOutput out = result.output(true);
        out.denominator = &result.scalars.at(0, mixes ? 1 : 2);
        check(cuda::enqueue_denominators(p, out, nullptr) == cudaSuccess, "%s: no sum of weights", name.c_str());
        check(result.ticket == 0, "%s: the ticket is not what it was", name.c_str());
        check(result.only_elements_written(), "%s: a kernel wrote outside its outputs", name.c_str());
    }

    // Forward writes the gradient for an upstream gradient of 1; backward leaves it or puts it right.
    void test_gradient_of_forward(const Layout& grad_layout) {
        const void* const upstream = std::exchange(p.upstream, nullptr);
        Result result(grad_layout, p);
        RowProblem q = with_outputs(result);
        check(forward(q, result, true) == cudaSuccess, "%s: forward with gradient was not launched", name.c_str());
        check(result.only_elements_written(), "%s: forward wrote outside its outputs", name.c_str());
        for_rows([&](std::int64_t o, std::int64_t i) {
            Base::compare_value(o, i, result.values.at(o, i));
            Base::compare_gradient(result.grad, "forward", o, i);
        });
        const Result written = result;
        q.grad_is_written = true;
        q.stats = nullptr;  // must not be read
        check(gradient(q) == cudaSuccess && result == written, "%s: backward touched a finished gradient",
              name.c_str());
        q.stats = p.stats_count > 0 ? result.stats.data() : nullptr;
        q.assumed_denominator = 12345;
        check(gradient(q) == cudaSuccess, "%s: backward was not launched", name.c_str());
        for_rows([&](std::int64_t o, std::int64_t i) { Base::compare_gradient(result.grad, "completed", o, i); });
        p.upstream = upstream;
    }

    // Forward writes the gradient for the upstream gradient that it assumes: to the bit what backward makes of it.
    void test_assumed_upstream(const Layout& grad_layout) {
        if (looks || p.stats_count == 0 || p.rows() == 0) return;
        A upstream = A(random.uniform(0.1, 3)), written_for = A(0), other = upstream + A(1);
        double next = 0;
        Result written(grad_layout, p), recomputed(grad_layout, p);
        const auto with = [&](Result& result, A& assumed) {
            RowProblem q = with_outputs(result);
            q.stats = nullptr;
            q.upstream = nullptr;
            q.assumed_upstream = double(upstream);
            q.written_upstream = &assumed;
            return q;
        };
        check(forward(with(written, written_for), written, true) == cudaSuccess, "%s: not launched", name.c_str());
        if (p.reduction != Reduction::kNone)
            check(written_for == upstream, "%s: forward did not say for what it wrote", name.c_str());
        const auto complete = [&](Result& result, A& assumed) {
            RowProblem q = with(result, assumed);
            q.upstream = &upstream, q.upstream_stride = {};
            q.grad_is_written = true;
            q.next_upstream = &next;
            check(gradient(q) == cudaSuccess, "%s: backward was not launched", name.c_str());
        };
        complete(recomputed, other);
        check(recomputed.grad == written.grad, "%s: the written gradient has other bits", name.c_str());
        check(next == double(upstream), "%s: the upstream gradient was not left", name.c_str());
        const Result before = written;
        next = 0, written_for = upstream;
        complete(written, written_for);
        check(next == 0 && written == before, "%s: backward touched a finished gradient", name.c_str());
    }

    // Bits of the rows give the gradient that their logits give, which need not be there any more.
    void test_gradient_of_bits(const Result& by_logits) {
        Result by_bits(by_logits.grad_layout, p);
        RowProblem q = with_outputs(by_bits);
        void* const grad = std::exchange(q.grad, nullptr);
        Guarded<unsigned> bits(layout_of(Kind::kRows, 1, p.rows() * cuda::words_of_bits(q), 1));
        if (bits.layout.size() == 0) return;
        q.bits = bits.data();
        if (forward(q, by_bits, true) != cudaSuccess) return;  // so little shared memory as no device has
        q.grad = grad;
        const auto given = logits;
        if (cuda::plan_of_bits(q, cuda_emulation::multiprocessors)) {
            for_rows([&](std::int64_t o, std::int64_t i) {
                for (int c = 0; c < shape.classes; ++c) logits.at(o, i, c) = narrow<Stored>(A(std::nan("")));
            });
            ++gradients_of_bits;
        }
        check(gradient(q) == cudaSuccess, "%s: the gradient of bits was not launched", name.c_str());
        logits = given;
        check(by_bits.grad == by_logits.grad, "%s: bits give another gradient", name.c_str());
        check(by_bits.only_elements_written() && bits.only_elements_written(), "%s: written outside", name.c_str());
    }

    // A row's part of the denominator.
    double weight_of(std::int64_t o, std::int64_t i, bool active) {
        if (ignored(o, i)) return 0;
        const double of_class = p.class_weight && !soft ? double(class_weight.at(0, 0, target_of(o, i))) : 1.0;
        return active && !(expected_of(o, i).value > 0) ? 0.0 : sample_weight_of(o, i) * of_class;
    }

    void compare_label_weights(Result& result) {
        double want[2] = {};
        for_rows([&](std::int64_t o, std::int64_t i) {
            const std::int64_t of_row[] = {target_of(o, i), Base::other32.at(o, i)};
            for (int k = 0; k < 2; ++k) {
                if (of_row[k] == p.ignore_index) continue;
                const double first = double(Base::lam.at(o, i)), part = k == 0 ? first : 1 - first;
                const double of_class = p.class_weight ? double(class_weight.at(0, 0, of_row[k])) : 1.0;
                want[p.lam ? 0 : k] += sample_weight_of(o, i) * of_class * (p.lam ? part : 1.0);
            }
        });
        if (p.lam) want[1] = want[0];
        for (int k = 0; k < 2; ++k) {
            const double got = double(result.scalars.at(0, 1 + k));
            check(std::fabs(got - want[k]) <= 1e-6 * want[k], "%s: weight of labels %.9g, not %.9g", name.c_str(), got,
                  want[k]);
        }
    }

    void compare_reduction(Result& result) {
        const bool guarded = p.reduction == Reduction::kActiveMean, active = guarded && is_multi_reduction_loss(p.loss);
        if (mixes) compare_label_weights(result);
        double value = 0, weight = guarded ? kActiveGuard : 0, size = 0, unsure = 0, all = 0;
        for_rows([&](std::int64_t o, std::int64_t i) {
            value += double(result.values.at(o, i));
            size += std::fabs(double(result.values.at(o, i)));
            if (mixes) return;
            weight += weight_of(o, i, active);
            all += weight_of(o, i, false);
            if (active && may_be_zero(expected_of(o, i))) unsure += weight_of(o, i, false);
        });
        const double counted = double(result.scalars.at(0, 2));
        check(mixes || std::fabs(counted - all) <= 1e-6 * all, "%s: weights %.9g, not %.9g", name.c_str(), counted,
              all);
        if (p.reduction == Reduction::kNone) return;
        if (has_mean()) {
            const double denominator = double(result.scalars.at(0, 1));
            check(std::fabs(denominator - weight) <= 1e-6 * weight + unsure, "%s: denominator %.9g, not %.9g",
                  name.c_str(), denominator, weight);
            weight = denominator;
        }
        const double divisor = !has_mean() ? 1.0 : (weight == 0 ? HUGE_VAL : weight);
        const double got = double(result.scalars.at(0, 0)), want = value / divisor;
        check(std::fabs(got - want) <= 1e-6 * size / divisor, "%s: loss %.9g, not %.9g", name.c_str(), got, want);
    }

    const bool looks;  // row statistics are asked for, too
    const A one = A(1);
};

}  // namespace fused_losses_test
