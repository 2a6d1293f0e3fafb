// The CUDA kernel of row statistics, run on the host by cuda_emulation, against sums in double: contiguous rows, rows
// with gaps and pixels, NaN, infinities and masked classes among the logits. Arguments: seeds.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda_emulation/scheduler.h"
#include "guarded.h"
#include "naive_statistics.h"

namespace {

using namespace fused_losses;
using namespace fused_losses_test;

template <class Stored>
double any_logit(Random& random) {
    const double special[] = {HUGE_VAL, -HUGE_VAL, -HUGE_VAL, std::nan(""), 0.0};
    const double z = random.one_in(60) ? special[random.below(5)] : 5 * random.bell();
    return double(widen(narrow<Stored>(acc_t<Stored>(z))));
}

template <class Stored>
void test(Dtype dtype, Kind kind, std::int64_t outer, std::int64_t inner, std::int64_t classes, Random& random) {
    using A = acc_t<Stored>;
    Guarded<Stored> logits(layout_of(kind, outer, inner, classes));
    Guarded<std::int32_t> target(layout_of(Kind::kEveryOther, outer, inner, 1));
    Guarded<A> stats(layout_of(Kind::kRows, 1, kRowStatistics * outer * inner, 1));
    Guarded<std::int64_t> argmax(layout_of(Kind::kRows, 1, outer * inner, 1));
    RowProblem p;
    p.dtype = dtype, p.index_type = IndexType::kInt32;
    p.outer = outer, p.inner = inner, p.num_classes = classes;
    p.logits = logits.data(), p.logits_stride = logits.layout.row, p.logits_class_stride = logits.layout.cls;
    p.target = target.data(), p.target_stride = target.layout.row;
    p.row_statistics = stats.data(), p.argmax = argmax.data();
    const bool masked = random.one_in(8);
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t i = 0; i < inner; ++i) {
            target.at(o, i) = random.one_in(5) ? -100 : random.below(int(classes));
            for (std::int64_t c = 0; c < classes; ++c)
                logits.at(o, i, c) = narrow<Stored>(A(masked && c % 3 != 1 ? -HUGE_VAL : any_logit<Stored>(random)));
        }
    const auto before = logits;
    cuda_emulation::largest_grid = random.one_in(2) ? 1 + random.below(2) : ~0u;
    check(cuda::enqueue_row_statistics(p, nullptr) == cudaSuccess, "not launched");
    check(before == logits && stats.only_elements_written() && argmax.only_elements_written(), "wrote elsewhere");
    for (std::int64_t o = 0; o < outer; ++o)
        for (std::int64_t i = 0; i < inner; ++i) {
            std::vector<double> z;
            for (std::int64_t c = 0; c < classes; ++c) z.push_back(double(widen(logits.at(o, i, c))));
            const bool ignored = target.at(o, i) == -100;
            const NaiveStatistics expected = statistics_of(z, ignored ? 0 : target.at(o, i), ignored);
            const std::int64_t row = o * inner + i;
            check(argmax.at(0, row) == expected.argmax, "argmax %lld, not %lld", (long long)argmax.at(0, row),
                  (long long)expected.argmax);
            for (int k = 0; k < kRowStatistics; ++k) {
                const double got = double(stats.at(0, k * outer * inner + row));
                check(close(got, expected.v[k], sizeof(A) == 8 ? 1e-12 : 1e-5), "%d classes, statistic %d: %g, not %g",
                      int(classes), k, got, expected.v[k]);
            }
        }
}

}  // namespace

int main(int argc, char** argv) {
    for (int k = 1; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        for (const int classes : {1, 2, 10, 16, 17, 33, 100, 300})
            for (int kind = 0; kind < kKinds; ++kind)
                for (const int rows : {1, 9, 40}) {
                    test<float>(Dtype::kFloat32, Kind(kind), 1 + rows % 2, rows, classes, random);
                    test<double>(Dtype::kFloat64, Kind(kind), 1, rows, classes, random);
                    test<Half>(Dtype::kFloat16, Kind(kind), 1, rows, classes, random);
                    test<BFloat16>(Dtype::kBFloat16, Kind(kind), 1, rows, classes, random);
                }
    }
    return report("CUDA row statistics");
}
