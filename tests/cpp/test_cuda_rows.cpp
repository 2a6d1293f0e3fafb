// The CUDA kernels of the row losses and of their reduction, run on the host by cuda_emulation, against naive_losses.h:
// every loss and parameter set in every regime, and layouts, dtypes and odd numbers of classes with options drawn at
// random. First argument: one case in so many; the others: seeds of their choice and of the order in which threads run.
#include <cstdlib>

#include "cuda/register_plan.h"
#include "cuda_accuracy.h"
#include "cuda_case.h"

namespace {

using namespace fused_losses_test;
using namespace fused_losses::cuda;

void test_case(Dtype dtype, const Shape& shape, int loss, const Params& params, Random& random, bool isolation) {
    const std::string name = describe(shape, dtype, loss);
    visit_dtype(dtype, [&]<class Stored>() {
        CudaCase<Stored> problem(shape, loss, params, random);
        isolation ? problem.test_isolation(name) : problem.test(name);
    });
}

// A thread, a warp and a block work on a row; pixels side by side are read by neighbouring threads.
void test_losses(int thinning, Random& random) {
    const Shape shapes[] = {{Kind::kRows, 1, 37, 11},
                            {Kind::kRows, 1, 11, 65},
                            {Kind::kPaddedRows, 1, 2, 1030},
                            {Kind::kPixels, 2, 33, 21}};
    for (int loss = 0; loss < AllLosses::size; ++loss)
        for (const Params& params : naive_loss(loss_names()[loss]).params)
            for (const Dtype dtype : kDtypes)
                for (const Shape& shape : shapes)
                    if (random.one_in(thinning)) test_case(dtype, shape, loss, params, random, false);
}

void test_any_loss(Dtype dtype, const Shape& shape, Random& random, bool isolation) {
    int loss = 0;
    do loss = random.one_in(4) ? 0 : random.below(AllLosses::size);
    while (shape.classes < 2 && needs_of(loss).min_classes > 1);
    const std::vector<Params>& sets = naive_loss(loss_names()[loss]).params;
    test_case(dtype, shape, loss, sets[random.below(int(sets.size()))], random, isolation);
}

// Several blocks, or several tiles of one, in every regime: none of these is left out.
void test_many_rows(Random& random) {
    const Shape shapes[] = {{Kind::kRows, 1, 700, 3},  {Kind::kRows, 1, 700, 32}, {Kind::kPixels, 2, 400, 20},
                            {Kind::kRows, 1, 150, 40}, {Kind::kRows, 1, 40, 300}, {Kind::kRows, 1, 5, 1100}};
    for (const Dtype dtype : kDtypes)
        for (const Shape& shape : shapes) test_any_loss(dtype, shape, random, false);
}

// A kernel whose rows stay in registers: an index of the tables in register_plan.h.
struct Kernel {
    enum { kTile, kDirect, kColumn } kind;
    std::size_t index;

    KernelKind compiled_for() const {
        return kind == kTile     ? kTileKernels[index].kind
               : kind == kDirect ? kDirectKernels[index].kind
                                 : kColumnKernels[index].kind;
    }
};

std::vector<Kernel> all_kernels() {
    std::vector<Kernel> all;
    for (std::size_t k = 0; k < std::size(kTileKernels); ++k) all.push_back({Kernel::kTile, k});
    for (std::size_t k = 0; k < std::size(kDirectKernels); ++k) all.push_back({Kernel::kDirect, k});
    for (std::size_t k = 0; k < std::size(kColumnKernels); ++k) all.push_back({Kernel::kColumn, k});
    return all;
}

// A random shape that is this kernel's business.
Shape shape_for(Dtype dtype, const Kernel& kernel, Random& random) {
    const bool is_column = kernel.kind == Kernel::kColumn;
    for (int tries = 0; tries < 10000; ++tries) {
        const int rows = 1 + random.below(kernel.kind == Kernel::kDirect ? 9 : 70);
        const int classes = 2 + random.below(kernel.kind == Kernel::kDirect && random.one_in(2) ? 12000 : 400);
        const Shape shape{is_column ? Kind::kPixels : Kind::kRows, is_column ? 2 : 1, rows, classes};
        RowProblem p;
        p.dtype = dtype, p.outer = shape.outer, p.inner = rows, p.num_classes = classes;
        const Layout layout = layout_of(shape.kind, p.outer, rows, classes);
        p.logits_stride = p.grad_stride = layout.row, p.logits_class_stride = p.grad_class_stride = layout.cls;
        RegisterPlan plan = plan_tiles(p, kernel.compiled_for(), 8);
        if (bool(plan) != (kernel.kind == Kernel::kTile)) continue;
        if (!plan) plan = plan_columns(p, kernel.compiled_for());
        if (plan.is_column != is_column) continue;
        if (!plan) plan = plan_direct(p, kernel.compiled_for(), kMaxCluster);
        if (plan && plan.kernel == int(kernel.index)) return shape;
    }
    check(false, "kernel %d of list %d has no rows", int(kernel.index), int(kernel.kind));
    return {Kind::kRows, 1, 1, 2};
}

// Each of those kernels, with each loss that it is compiled for. Of softmax losses, which all cases above are about,
// one in so many.
void test_registers(int thinning, Random& random) {
    constexpr struct {
        KernelKind kind;
        const char* loss;
        int params;
    } multi_reduction[] = {{KernelKind::kOneKept, "hem", 0},          {KernelKind::kOneKept, "multi_margin", 0},
                           {KernelKind::kOneKept, "multi_margin", 4}, {KernelKind::kOneKept, "bi_tempered", 0},
                           {KernelKind::kTwoKept, "ngce", 0},         {KernelKind::kTwoKept, "nfl", 0},
                           {KernelKind::kTwoKept, "anl_fl", 0},       {KernelKind::kTwoKept, "jal_fl", 0},
                           {KernelKind::kTwoKept, "ldr_kl", 0}};
    const auto test_kernel = [&](Dtype dtype, const Kernel& kernel, int given_loss, int params) {
        const Shape shape = shape_for(dtype, kernel, random);
        visit_dtype(dtype, [&]<class Stored>() {
            for (bool is_done = false; !is_done;) {
                const int loss = given_loss < 0 ? random.below(SoftmaxLosses::size) : given_loss;
                const bool looks = kernel.compiled_for() == KernelKind::kStatistics;
                const bool may_look = looks || is_multi_reduction(kernel.compiled_for());
                CudaCase<Stored> problem(shape, loss, naive_loss(loss_names()[loss]).params[params], random, may_look,
                                         looks);
                is_done = problem.is_for(kernel.compiled_for());
                if (is_done) problem.test_planned(describe(shape, dtype, loss));
            }
        });
    };
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16})
        for (const Kernel& kernel : all_kernels()) {
            if (!is_multi_reduction(kernel.compiled_for()) && random.one_in(thinning))
                test_kernel(dtype, kernel, -1, 0);
            for (const auto& of : multi_reduction)
                if (of.kind == kernel.compiled_for() && random.one_in(std::max(1, thinning / 16)))
                    test_kernel(dtype, kernel, index_of(AllLosses{}, of.loss), of.params);
        }
}

// As of logits[:, :C] of a wider tensor: the gradient has no gaps.
void test_offsets(Random& random) {
    const Shape shapes[] = {{Kind::kRows, 1, 3, 70}, {Kind::kRows, 1, 3, 300}, {Kind::kRows, 1, 2, 1100}};
    for (const Dtype dtype : kDtypes)
        visit_dtype(dtype, [&]<class Stored>() {
            for (int offset = 0; offset < int(16 / sizeof(Stored)); ++offset)
                for (const bool multi_reduction : {false, true}) {
                    const Shape& shape = shapes[random.below(3)];
                    const int loss =
                        multi_reduction ? AllLosses::size - 1 - random.below(MultiReductionLosses::size) : 0;
                    const std::vector<Params>& sets = naive_loss(loss_names()[loss]).params;
                    CudaCase<Stored> problem(shape, loss, sets[random.below(int(sets.size()))], random);
                    problem.test_offset(describe(shape, dtype, loss), offset);
                }
        });
}

// Of a softmax loss, of one of which more is asked and of a multi-reduction loss. Doubles have none.
void test_large_clusters(Random& random) {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
    for (int kind = 0; kind < 3; ++kind) {
        const bool multi_reduction = kind == 2, more = kind == 1;
        const Dtype dtype = dtypes[random.below(3)];
        // Statistics are of class labels; cross entropy might get a soft target.
        const int loss = multi_reduction ? AllLosses::size - 1 - random.below(MultiReductionLosses::size)
                                         : more + random.below(SoftmaxLosses::size - more);
        // More than 8 blocks of 256 threads have room for: 64 numbers of one that keeps nothing else, else 48 or fewer.
        const Shape shape{Kind::kRows, 1, 2, !multi_reduction && !more ? 131601 : 98401};
        // Others may cut off what is less likely than 1e-3, which is all classes here.
        const Params& params = naive_loss(loss_names()[loss]).params.front();
        visit_dtype(dtype, [&]<class Stored>() {
            CudaCase<Stored> problem(shape, loss, params, random, more, more);
            problem.test_large_cluster(describe(shape, dtype, loss));
        });
        check(std::exchange(cuda_emulation::widest_launch, 0) == 16, "no launch had clusters of 16 blocks");
    }
}

void test_shapes(int thinning, Random& random) {
    for (const Dtype dtype : kDtypes)
        for (const int classes : {1, 2, 5, 8, 16, 17, 31, 33, 100, 129, 1001, 1024, 1027, 2049})
            for (const int rows : {0, 1, 9, 300})
                for (int kind = 0; kind < kKinds; ++kind) {
                    if (rows * classes > 10000 || !random.one_in(thinning)) continue;
                    const bool images = kind >= int(Kind::kPixels) || random.one_in(4);
                    const Shape shape{Kind(kind), images && rows > 1 ? 2 : 1, rows, classes};
                    test_any_loss(dtype, shape, random, random.one_in(5));
                }
}

}  // namespace

int main(int argc, char** argv) {
    const int thinning = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    test_accuracies();
    for (int k = 2; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        test_losses(thinning, random);
        test_shapes(thinning, random);
        test_many_rows(random);
        test_registers(thinning, random);
        test_offsets(random);
        test_large_clusters(random);
    }
    check(argc == 1 || gradients_of_bits > 0, "no gradient was made of bits");
    return report("CUDA row kernels");
}
