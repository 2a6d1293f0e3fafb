// The CUDA kernel of early-learning regularisation, run on the host by cuda_emulation, against the published formulas
// in double: contiguous rows, rows with gaps and pixels, samples with several rows, rows without probabilities.
// Arguments: seeds.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda_emulation/scheduler.h"
#include "guarded.h"
#include "naive_statistics.h"

namespace {

using namespace fused_losses;
using namespace fused_losses_test;

struct Problem {
    Kind kind;
    std::int64_t outer, inner, classes;
    bool updates, in_order, with_grad;
    double beta, lam;
};

// One row by the published formulas; `t` becomes what is remembered next, as the memory holds it.
template <class Kept>
double one_row(const std::vector<double>& z, int target, const Problem& of, std::vector<double>& t,
               std::vector<double>& grad) {
    const double top = *std::max_element(z.begin(), z.end());
    double sum = 0, sum_clamped = 0, rest = 0;
    std::vector<double> p;
    for (const double x : z) p.push_back(std::exp(x - top)), sum += p.back();
    for (double& x : p) x /= sum, sum_clamped += std::clamp(x, 1e-4, 1 - 1e-4);
    for (std::size_t c = 0; c < z.size() && of.updates; ++c) {
        const double next = of.beta * t[c] + (1 - of.beta) * std::clamp(p[c], 1e-4, 1 - 1e-4) / sum_clamped;
        const double most = sizeof(Kept) == 2 ? 1 - 1.0 / 256 : 1.0;
        t[c] = double(widen(narrow<Kept>(float(std::min(next, most)))));
    }
    for (std::size_t c = 0; c < z.size(); ++c) rest += p[c] * (1 - t[c]);
    for (std::size_t c = 0; c < z.size(); ++c)
        grad.push_back(p[c] - (int(c) == target) + of.lam * p[c] * ((1 - t[c]) / rest - 1));
    return of.lam * std::log(rest) - std::log(p[target]);
}

template <class Stored, class Kept>
void test(Dtype dtype, const Problem& of, Random& random) {
    using A = acc_t<Stored>;
    const std::int64_t rows = of.outer * of.inner, classes = of.classes, samples = 2 * rows + 1;
    Guarded<Stored> logits(layout_of(of.kind, of.outer, of.inner, classes));
    Guarded<A> grad(layout_of(of.kind, of.outer, of.inner, classes));
    Guarded<std::int16_t> target(layout_of(Kind::kEveryOther, of.outer, of.inner, 1));
    Guarded<Kept> memory(layout_of(Kind::kRows, 1, samples, classes));
    Guarded<A> values(layout_of(Kind::kRows, 1, rows, 1)), scale(values.layout),
        numbers(layout_of(Kind::kRows, 1, 2, 1));
    std::vector<std::int64_t> place(rows), order(rows);
    std::iota(order.begin(), order.end(), 0);
    RowProblem p;
    p.dtype = dtype, p.index_type = IndexType::kInt16;
    p.outer = of.outer, p.inner = of.inner, p.num_classes = classes;
    p.logits = logits.data(), p.logits_stride = logits.layout.row, p.logits_class_stride = logits.layout.cls;
    p.target = target.data(), p.target_stride = target.layout.row;
    p.row_values = values.data();
    if (of.with_grad) p.grad = grad.data(), p.grad_stride = grad.layout.row, p.grad_class_stride = grad.layout.cls;
    ElrMemory m;
    m.rows = memory.data(), m.is_bfloat16 = sizeof(Kept) == 2, m.updates = of.updates, m.place = place.data();
    if (!of.in_order) m.order = order.data();
    if (random.one_in(2)) m.scale = scale.data();
    if (random.one_in(2))
        m.parameters = numbers.data(), numbers.at(0, 0) = A(of.beta), numbers.at(0, 1) = A(of.lam);
    else
        m.beta = of.beta, m.lam = of.lam;
    for (std::int64_t i = 0; i < samples; ++i)
        for (std::int64_t c = 0; c < classes; ++c)
            memory.at(0, i, c) = narrow<Kept>(float(0.9 * random.uniform(0, 1) / double(classes)));
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t o = row / of.inner, i = row % of.inner;
        place[row] = of.in_order ? 2 * (rows - row) : random.below(int(rows + 1));
        scale.at(0, row) = A(random.uniform(0, 1));
        target.at(o, i) = std::int16_t(random.one_in(5) ? -100 : random.below(int(classes)));
        const bool broken = random.one_in(6);
        for (std::int64_t c = 0; c < classes; ++c)
            logits.at(o, i, c) = narrow<Stored>(A(broken && c == classes / 2 ? std::nan("") : 3 * random.bell()));
    }
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return place[a] < place[b]; });

    const auto logits_before = logits;
    const auto memory_before = memory;
    auto expected = memory;
    cuda_emulation::largest_grid = random.one_in(2) ? 1 + random.below(2) : ~0u;
    check(cuda::enqueue_elr(p, m, nullptr) == cudaSuccess, "not launched");
    check(logits_before == logits && values.only_elements_written() && grad.only_elements_written() &&
              memory.only_elements_written(),
          "wrote elsewhere");
    const double tolerance = sizeof(A) == 8 ? 1e-12 : 2e-5;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t o = row / of.inner, i = row % of.inner;
        const bool ignored = target.at(o, i) == -100;
        std::vector<double> z, t, g;
        for (std::int64_t c = 0; c < classes; ++c) {
            z.push_back(double(widen(logits.at(o, i, c))));
            t.push_back(double(widen(const_cast<Guarded<Kept>&>(memory_before).at(0, place[row], c))));
        }
        const bool usable = !ignored && std::none_of(z.begin(), z.end(), [](double x) { return std::isnan(x); });
        const double value = usable ? one_row<Kept>(z, target.at(o, i), of, t, g) : (ignored ? 0.0 : std::nan(""));
        check(close(double(values.at(0, row)), value, tolerance), "row %d: %g, not %g", int(row),
              double(values.at(0, row)), value);
        for (std::int64_t c = 0; c < classes; ++c) {
            if (usable && of.updates) expected.at(0, place[row], c) = narrow<Kept>(float(t[c]));
            if (!of.with_grad) continue;
            const double right = (usable ? g[c] : value) * (m.scale ? double(scale.at(0, row)) : 1.0);
            check(close(double(grad.at(o, i, c)), right, tolerance), "gradient %g, not %g", double(grad.at(o, i, c)),
                  right);
        }
    }
    for (std::int64_t i = 0; i < samples; ++i)
        for (std::int64_t c = 0; c < classes; ++c)  // bfloat16: to the other neighbour where it is near the middle
            check(close(double(widen(memory.at(0, i, c))), double(widen(expected.at(0, i, c))),
                        sizeof(Kept) == 2 ? 1.0 / 128 : 1e-5),
                  "memory %g, not %g", double(widen(memory.at(0, i, c))), double(widen(expected.at(0, i, c))));
}

void test_any_memory(Dtype dtype, const Problem& of, Random& random) {
    const bool is_float = random.one_in(2);
    visit_dtype(dtype, [&]<class Stored>() {
        is_float ? test<Stored, float>(dtype, of, random) : test<Stored, BFloat16>(dtype, of, random);
    });
}

}  // namespace

int main(int argc, char** argv) {
    for (int k = 1; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        for (const int classes : {2, 10, 17, 100})
            for (int kind = 0; kind < kKinds; ++kind)
                for (const bool updates : {true, false}) {
                    const Problem of{Kind(kind),
                                     1 + kind % 2,
                                     1 + random.below(20),
                                     classes,
                                     updates,
                                     bool(random.one_in(2)),
                                     !random.one_in(4),
                                     random.uniform(0, 1),
                                     4 * random.uniform(0, 1)};
                    for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16})
                        test_any_memory(dtype, of, random);
                }
    }
    return report("CUDA early-learning regularisation");
}
