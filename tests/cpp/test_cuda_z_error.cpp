// The CUDA kernels of Z-Error, run on the host by cuda_emulation: class statistics, mask, loss and gradient. First
// argument: number of problems; the others: seeds of the problems and of the order in which threads run.
#include <cstdlib>

#include "z_error_case.h"

int main(int argc, char** argv) {
    using namespace fused_losses_test;
    const int count = argc > 1 ? std::atoi(argv[1]) : 100;
    for (int k = 2; k < argc; ++k) {
        Random random(std::strtoull(argv[k], nullptr, 10));
        cuda_emulation::random.seed(random.bits());
        for (int i = 0; i < count; ++i) {
            const std::string name = "seed " + std::string(argv[k]) + ", problem " + std::to_string(i);
            i % 3 == 0 ? ZCase<double>(random, name).test() : ZCase<float>(random, name).test();
        }
    }
    return report("CUDA Z-Error kernels");
}
