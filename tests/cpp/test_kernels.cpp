// The CPU kernels of one instruction set (first argument) against naive_losses.h, over dtypes, numbers of rows and
// classes and layouts, with options drawn at random for each. The second argument thins the cases out: one in so many.
#include <cstdlib>
#include <new>

#include "kernel_case.h"

// Scratch of the kernels: filled, so that reading it before writing shows.
void* operator new(std::size_t size, std::align_val_t alignment) {
    void* pointer = nullptr;
    if (posix_memalign(&pointer, static_cast<std::size_t>(alignment), size) != 0) throw std::bad_alloc();
    return std::memset(pointer, fused_losses_test::paint_byte, size);
}

void operator delete(void* pointer, std::align_val_t) noexcept { std::free(pointer); }

namespace {

using namespace fused_losses_test;

struct Draw {
    int loss;
    Params params;
};

// A loss and a set of its parameters; cross entropy, which has most options, more often than the others.
Draw draw_loss(Random& random, std::int64_t classes) {
    int loss = 0;
    do loss = random.one_in(4) ? 0 : random.below(AllLosses::size);
    while (classes < 2 && needs_of(loss).min_classes > 1);
    const std::vector<Params>& sets = naive_loss(loss_names()[loss]).params;
    return {loss, sets[random.below(int(sets.size()))]};
}

void test_case(Dtype dtype, const Shape& shape, const Draw& draw, Random& random, bool isolation = false) {
    const std::string name = describe(shape, dtype, draw.loss);
    visit_dtype(dtype, [&]<class Stored>() {
        Case<Stored> problem(shape, draw.loss, draw.params, random);
        isolation ? problem.test_isolation(name) : problem.test(name);
    });
}

// Layouts whose classes are apart come as images of pixels and, one pixel an image, as rows.
Shape make_shape(Kind kind, int rows, int classes, Random& random) {
    const bool images = kind == Kind::kPixels || kind == Kind::kStridedPixels || random.one_in(4);
    if (kind == Kind::kEveryOther && random.one_in(2)) return {kind, rows, 1, classes};
    return {kind, images ? 2 : 1, rows, classes};
}

void test_shapes(int thinning) {
    Random random(4);
    for (const Dtype dtype : kDtypes) {
        for (const int classes : {1, 2, 3, 10, 32, 33, 100, 101, 1000, 1001}) {
            for (const int rows : {0, 1, 15, 16, 63, 64, 65, 200}) {
                if (classes >= 1000 && rows > 16 && rows != 65) continue;
                for (int kind = 0; kind < kKinds; ++kind) {
                    const Shape shape = make_shape(Kind(kind), rows, classes, random);
                    const Draw draw = draw_loss(random, classes);
                    if (random.one_in(thinning)) test_case(dtype, shape, draw, random);
                }
            }
        }
    }
}

// Every loss and parameter set, in both kinds of tile; those with margins more often, as there are more ways to give
// one.
void test_losses(int thinning) {
    Random random(5);
    for (const Dtype dtype : kDtypes) {
        for (int loss = 0; loss < AllLosses::size; ++loss) {
            for (const Params& params : naive_loss(loss_names()[loss]).params) {
                const int repeats = needs_of(loss).has_margin ? 8 : 1;
                for (int i = 0; i < 2 * repeats; ++i) {
                    const int classes = i % 2 ? 101 : 10;
                    if (!random.one_in(thinning)) continue;
                    test_case(dtype, {Kind::kRows, 1, 33, classes}, {loss, params}, random);
                    test_case(dtype, {Kind::kPixels, 2, 33, classes}, {loss, params}, random);
                }
            }
        }
    }
}

// More classes than a tile of pixels may have, so that rows are gathered one by one.
void test_many_classes() {
    Random random(6);
    const auto classes = static_cast<std::int64_t>(Tiling::kMaxPixelClasses) + 9;
    for (const Dtype dtype : kDtypes)
        for (int i = 0; i < 3; ++i)
            test_case(dtype, {Kind::kPixels, 2, 3, classes}, draw_loss(random, classes), random);
}

void test_isolation() {
    Random random(7);
    for (int i = 0; i < 300; ++i) {
        const Shape shape = make_shape(Kind(random.below(kKinds)), 1 + random.below(70), 2 + random.below(60), random);
        test_case(kDtypes[random.below(4)], shape, draw_loss(random, shape.classes), random, true);
    }
}

bool choose_kernels(const std::string& isa) {
    if (isa == "baseline") kernels = cpu_kernels<Isa::baseline>();
#ifdef FL_HAVE_AVX2
    if (isa == "avx2") kernels = cpu_kernels<Isa::avx2>();
#endif
#ifdef FL_HAVE_AVX512
    if (isa == "avx512") kernels = cpu_kernels<Isa::avx512>();
#endif
    return kernels.forward != nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    const int thinning = argc > 2 ? std::max(1, std::atoi(argv[2])) : 1;
    if (argc < 2 || !choose_kernels(argv[1])) {
        std::fprintf(stderr, "usage: %s baseline|avx2|avx512 [thinning]\n", argv[0]);
        return 2;
    }
    test_shapes(thinning);
    test_losses(thinning);
    test_many_classes();
    test_isolation();
    return report("kernels");
}
