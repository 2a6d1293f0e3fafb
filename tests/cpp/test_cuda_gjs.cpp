// The CUDA kernel of the generalised Jensen-Shannon divergence, run on the host by cuda_emulation, against the
// definition in double: views in layouts of their own, masked classes, NaN. Arguments: seeds.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda_emulation/scheduler.h"
#include "guarded.h"
#include "naive_statistics.h"

namespace {

using namespace fused_losses;
using namespace fused_losses_test;

std::vector<double> softmax(std::vector<double> z) {
    const double top = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (double& x : z) x = std::exp(x - top), sum += x;
    for (double& x : z) x /= sum;
    return z;
}

template <class A>
void test(Dtype dtype, Kind kind, std::int64_t outer, std::int64_t inner, std::int64_t classes, Random& random) {
    const int count = 1 + random.below(3);
    std::vector<Guarded<A>> logits, grads;
    Guarded<std::int64_t> target(layout_of(Kind::kEveryOther, outer, inner, 1));
    Guarded<A> values(layout_of(Kind::kRows, 1, outer * inner, 1));
    RowProblem p;
    p.dtype = dtype, p.outer = outer, p.inner = inner, p.num_classes = classes;
    p.target = target.data(), p.target_stride = target.layout.row, p.row_values = values.data();
    GjsViews views;
    views.count = count, views.label_weight = random.uniform(0.1, 0.9);
    for (int i = 0; i < count; ++i) {
        logits.emplace_back(layout_of(i == 0 ? kind : Kind(random.below(kKinds)), outer, inner, classes));
        grads.emplace_back(layout_of(Kind(random.below(kKinds)), outer, inner, classes));
    }
    const bool with_grad = !random.one_in(4);
    for (int i = 0; i < count; ++i) {
        const Layout &from = logits[i].layout, &to = grads[i].layout;
        views.views[i] = {logits[i].data(),
                          from.row,
                          from.cls,
                          with_grad ? grads[i].data() : nullptr,
                          to.row,
                          to.cls,
                          (1 - views.label_weight) / count};
        for (std::int64_t o = 0; o < outer; ++o)
            for (std::int64_t r = 0; r < inner; ++r)
                for (std::int64_t c = 0; c < classes; ++c)
                    logits[i].at(o, r, c) = A(random.one_in(30) && c > 0 ? -HUGE_VAL : 3 * random.bell());
    }
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t r = 0; r < inner; ++r) target.at(o, r) = random.below(int(classes));
    const auto before = logits;
    cuda_emulation::largest_grid = random.one_in(2) ? 1 + random.below(2) : ~0u;
    check(cuda::enqueue_gjs(p, views, nullptr) == cudaSuccess, "not launched");
    check(before == logits && values.only_elements_written(), "wrote elsewhere");
    const double tolerance = sizeof(A) == 8 ? 1e-11 : 2e-5, label = views.label_weight;
    const double normaliser = -1 / ((1 - label) * std::log(1 - label));
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t r = 0; r < inner; ++r) {
            std::vector<double> mean(classes, 0.0);
            std::vector<std::vector<double>> probabilities;
            for (int i = 0; i < count; ++i) {
                std::vector<double> z;
                for (std::int64_t c = 0; c < classes; ++c) z.push_back(double(logits[i].at(o, r, c)));
                probabilities.push_back(softmax(z));
                for (std::int64_t c = 0; c < classes; ++c) mean[c] += views.views[i].weight * probabilities[i][c];
            }
            mean[target.at(o, r)] += label;
            double value = -label * std::log(mean[target.at(o, r)]);
            for (int i = 0; i < count; ++i) {
                const auto log_ratio = [&](std::int64_t c) {
                    return probabilities[i][c] == 0 ? 0 : std::log(probabilities[i][c] / mean[c]);
                };
                double divergence = 0;
                for (std::int64_t c = 0; c < classes; ++c) divergence += probabilities[i][c] * log_ratio(c);
                value += views.views[i].weight * divergence;
                for (std::int64_t c = 0; c < classes && with_grad; ++c) {
                    const double right =
                        normaliser * views.views[i].weight * probabilities[i][c] * (log_ratio(c) - divergence);
                    check(std::fabs(double(grads[i].at(o, r, c)) - right) <= tolerance, "gradient %g, not %g",
                          double(grads[i].at(o, r, c)), right);
                }
            }
            const double got = double(values.at(0, o * inner + r));
            check(std::fabs(got - normaliser * value) <= 2 * tolerance, "value %g, not %g", got, normaliser * value);
        }
    for (const auto& grad : grads) check(grad.only_elements_written(), "wrote elsewhere");
}

}  // namespace

int main(int argc, char** argv) {
    for (int k = 1; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        for (const int classes : {2, 10, 17, 100, 105, 417})
            for (int kind = 0; kind < kKinds; ++kind)
                for (const int rows : {1, 12}) {
                    test<float>(Dtype::kFloat32, Kind(kind), 1 + rows % 2, rows, classes, random);
                    test<double>(Dtype::kFloat64, Kind(kind), 1, rows, classes, random);
                }
    }
    return report("CUDA generalised Jensen-Shannon divergence");
}
