// Prints how the rows of an H100 are shared out, a line for each problem given as LAYOUT:DTYPE:KIND:CLASSES:ROWS:LOSS;
// for issue_report.py. LAYOUT: rows or pixels. KIND: the number of a KernelKind. LOSS: its name, whose number comes
// after the plan, and then PLACE:NUMBER for what else a kernel is told of the call, the places in bytes from its first
// argument. Compiled with the headers of tests/cpp/cuda_emulation: no GPU, no CUDA toolkit.
#include <cstdio>
#include <cstring>

#include "cuda/register_launch.cuh"
#include "losses/names.h"

// Of the step that is counted: forward that writes the gradient, a mean of rows without weights.
void print_told(const fused_losses::RowProblem& p, int loss) {
    fused_losses::cuda::RegisterArgs args(p);
    args.take_direction(fused_losses::cuda::Direction::kForward);
    const auto told = [&](const auto& of, int number) {
        const auto at = reinterpret_cast<const char*>(&of) - reinterpret_cast<const char*>(&args);
        std::printf(" %td:%d", at, number);
    };
    if (loss >= 0) told(args.problem.loss, loss);
    for (const bool* flag : {&args.is_weighted, &args.keeps_rows, &args.is_saved, &args.recomputes, &args.is_plain})
        told(*flag, *flag);
    told(args.writes_gradient, 1);
    std::printf("\n");
}

int main(int argc, char** argv) {
    using namespace fused_losses;
    for (int i = 1; i < argc; ++i) {
        char layout[16] = {}, dtype[16] = {}, loss[32] = {};
        int kind = 0;
        long long classes = 0, rows = 0;
        if (std::sscanf(argv[i], "%15[a-z0-9]:%15[a-z0-9]:%d:%lld:%lld:%31[a-z0-9_]", layout, dtype, &kind, &classes,
                        &rows, loss) != 6)
            return 1;
        const bool is_pixels = std::strcmp(layout, "pixels") == 0;
        RowProblem p;
        p.dtype = std::strcmp(dtype, "float32") == 0 ? Dtype::kFloat32 : Dtype::kBFloat16;
        p.inner = rows, p.num_classes = classes;
        p.logits_stride = p.grad_stride = {rows * classes, is_pixels ? 1 : classes};
        p.logits_class_stride = p.grad_class_stride = is_pixels ? rows : 1;
        constexpr int multiprocessors = 132, largest_cluster = 16;
        const char* found = "tile";
        cuda::RegisterPlan plan;
        if (is_pixels) {
            found = "columns", plan = cuda::plan_columns(p, cuda::KernelKind(kind));
        } else {
            plan = cuda::plan_tiles(p, cuda::KernelKind(kind), multiprocessors);
            if (!plan) found = "direct", plan = cuda::plan_direct(p, cuda::KernelKind(kind), largest_cluster);
        }
        if (!plan) found = "none";
        const bool conflicts = plan && std::strcmp(found, "tile") == 0;
        const int number = index_of(CompiledLosses{}, loss);
        std::printf("%s %d %d %d %d %d %d %d %d %d %d", found, int(plan.kind), plan.lanes, plan.held, plan.rounds,
                    plan.tile_rows, plan.tile_bytes, plan.threads, plan.cluster,
                    conflicts ? cuda::conflicts_of(p, plan) : 1, number);
        print_told(p, number);
    }
}
