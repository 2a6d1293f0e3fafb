// Prints how the rows of an H100 are shared out, a line for each problem given as DTYPE:FACTORS:CLASSES:ROWS; for
// issue_report.py. Compiled with the headers of tests/cpp/cuda_emulation: no GPU, no CUDA toolkit.
#include <cstdio>
#include <cstring>

#include "cuda/register_plan.h"

int main(int argc, char** argv) {
    using namespace fused_losses;
    for (int i = 1; i < argc; ++i) {
        char dtype[16] = {};
        int factors = 0;
        long long classes = 0, rows = 0;
        if (std::sscanf(argv[i], "%15[a-z0-9]:%d:%lld:%lld", dtype, &factors, &classes, &rows) != 4) return 1;
        RowProblem p;
        p.dtype = std::strcmp(dtype, "float32") == 0 ? Dtype::kFloat32 : Dtype::kBFloat16;
        p.class_factors = ClassFactors(factors);
        p.inner = rows, p.num_classes = classes;
        p.logits_stride = p.grad_stride = {rows * classes, classes};
        constexpr int multiprocessors = 132, largest_cluster = 16;
        cuda::RegisterPlan plan = cuda::plan_tiles(p, cuda::factors_of(p), multiprocessors);
        const bool tiled = bool(plan);
        if (!plan) plan = cuda::plan_direct(p, cuda::factors_of(p), largest_cluster);
        if (!plan) return 1;
        std::printf("%s %d %d %d %d %d %d %d %d %d\n", tiled ? "tile" : "direct", int(plan.factors), plan.lanes,
                    plan.held, plan.rounds, plan.tile_rows, plan.tile_bytes, plan.threads, plan.cluster,
                    tiled ? cuda::conflicts_of(p, plan) : 1);
    }
}
