// The CUDA kernels of rescaled logits, run on the host by cuda_emulation, against the definition in double: contiguous
// rows, rows with gaps and pixels, masked classes, ignored rows, rows of zeros. Arguments: seeds.
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

struct Factor {
    double factor, slope;  // its derivative in the norm
};

Factor factor_of(bool clips, double parameter, double norm) {
    if (clips && norm <= parameter) return {1, 0};
    if (clips) return {parameter / norm, -parameter / norm / norm};
    const double factor = 1 / (parameter * (norm + 1e-7));
    return {factor, -factor / (norm + 1e-7)};
}

template <class Stored>
void test(Dtype dtype, Kind kind, std::int64_t outer, std::int64_t inner, std::int64_t classes, Random& random) {
    using A = acc_t<Stored>;
    const Layout layout = layout_of(kind, outer, inner, classes);
    Guarded<Stored> logits(layout), grad(layout);
    Guarded<A> rescaled(layout), upstream(layout_of(Kind::kEveryOther, outer, inner, classes));
    Guarded<A> norms(layout_of(Kind::kRows, 1, outer * inner, 1)), number(layout_of(Kind::kRows, 1, 1, 1));
    Guarded<std::uint8_t> target(layout_of(Kind::kEveryOther, outer, inner, 1));
    const bool clips = random.one_in(2);
    const double parameter = double(A(random.uniform(0.5, 3)));
    RowProblem p;
    p.dtype = dtype, p.index_type = IndexType::kUInt8, p.ignore_index = 1;
    p.outer = outer, p.inner = inner, p.num_classes = classes;
    p.logits = logits.data(), p.logits_stride = layout.row, p.logits_class_stride = layout.cls;
    const bool has_target = !random.one_in(3);
    if (has_target) p.target = target.data(), p.target_stride = target.layout.row;
    p.grad = rescaled.data(), p.grad_stride = layout.row, p.grad_class_stride = layout.cls;
    LogitRescale of;
    of.clips = clips, of.norms = norms.data(), number.at(0, 0) = A(parameter);
    random.one_in(2) ? void(of.parameter = parameter) : void(of.on_device = number.data());
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t i = 0; i < inner; ++i) {
            target.at(o, i) = std::uint8_t(random.one_in(4) ? 1 : 0);
            const double spread = random.one_in(8) ? 0 : random.uniform(0.1, 2);
            for (std::int64_t c = 0; c < classes; ++c) {
                logits.at(o, i, c) = narrow<Stored>(A(random.one_in(20) ? -HUGE_VAL : spread * random.bell()));
                upstream.at(o, i, c) = A(random.bell());
            }
        }
    const auto before = logits;
    cuda_emulation::largest_grid = random.one_in(2) ? 1 + random.below(2) : ~0u;
    check(cuda::enqueue_rescale(p, of, nullptr) == cudaSuccess, "not launched");
    of.upstream = upstream.data(), of.upstream_stride = upstream.layout.row;
    of.upstream_class_stride = upstream.layout.cls, p.grad = grad.data();
    check(cuda::enqueue_rescale(p, of, nullptr) == cudaSuccess, "not launched");
    check(before == logits && rescaled.only_elements_written() && norms.only_elements_written() &&
              grad.only_elements_written(),
          "wrote elsewhere");
    const double computed = sizeof(A) == 8 ? 1e-12 : 1e-5, stored = sizeof(Stored) == 2 ? 1.0 / 256 : 0;
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t i = 0; i < inner; ++i) {
            const bool ignored = has_target && target.at(o, i) == 1;
            const auto logit = [&](std::int64_t c) { return double(widen(logits.at(o, i, c))); };
            double squares = 0, dot = 0;
            for (std::int64_t c = 0; c < classes; ++c) {
                if (std::isinf(logit(c))) continue;
                squares += logit(c) * logit(c), dot += logit(c) * double(upstream.at(o, i, c));
            }
            const double norm = std::sqrt(squares);
            const Factor by = factor_of(clips, parameter, norm);
            for (std::int64_t c = 0; c < classes; ++c) {
                const double z = std::isinf(logit(c)) ? 0 : logit(c), g = double(upstream.at(o, i, c));
                const double along = norm == 0 ? 0 : by.slope * dot / norm;
                check(close(double(rescaled.at(o, i, c)), ignored ? 0 : by.factor * logit(c), computed),
                      "rescaled %g, not %g", double(rescaled.at(o, i, c)), by.factor * logit(c));
                const double right = ignored ? 0 : by.factor * g + along * z;
                const double size = ignored ? 0 : std::fabs(by.factor * g) + std::fabs(along * z);  // they may cancel
                const double got = double(widen(grad.at(o, i, c)));
                const bool too_large =
                    std::isinf(double(widen(narrow<Stored>(A(right)))));  // a row of zeros in float16
                check(too_large ? std::isinf(got) : std::fabs(got - right) <= (10 * computed + stored) * size,
                      "gradient %g, not %g", got, right);
            }
        }
}

}  // namespace

int main(int argc, char** argv) {
    for (int k = 1; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        for (const int classes : {2, 10, 17, 100})
            for (int kind = 0; kind < kKinds; ++kind)
                for (const int rows : {1, 20}) {
                    test<float>(Dtype::kFloat32, Kind(kind), 1 + rows % 2, rows, classes, random);
                    test<double>(Dtype::kFloat64, Kind(kind), 1, rows, classes, random);
                    test<Half>(Dtype::kFloat16, Kind(kind), 1, rows, classes, random);
                    test<BFloat16>(Dtype::kBFloat16, Kind(kind), 1, rows, classes, random);
                }
    }
    return report("CUDA rescaled logits");
}
