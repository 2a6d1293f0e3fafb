// What makes a library of the emulated kernels and csrc/ops, which tests/emulated_cuda.py gives to Python: a thread
// that runs all launches, and assertions of kernels that end the launch instead of the process.
#include <cuda_runtime_api.h>

#include <cstdlib>

namespace cuda_emulation {
namespace {

// Launches come from the threads of autograd, too; shared memory is that of one thread.
class LaunchThread {
public:
    LaunchThread() {
        std::thread([this] {
            const_cast<volatile uint4&>(fused_losses::cuda::dynamic_shared[0]).x = 0;  // from now on it has a place
            for (std::unique_lock lock(mutex);; job = nullptr, changed.notify_all()) {
                changed.wait(lock, [&] { return job; });
                (*job)();
            }
        }).detach();
    }

    void run(const std::function<void()>& launch) {
        const std::lock_guard one_at_a_time(turn);
        std::unique_lock lock(mutex);
        job = &launch;
        changed.notify_all();
        changed.wait(lock, [&] { return !job; });
    }

private:
    std::mutex turn, mutex;
    std::condition_variable changed;
    const std::function<void()>* job = nullptr;
};

void run_on_thread(const std::function<void()>& launch) {
    static LaunchThread& thread = *new LaunchThread;
    thread.run(launch);
}

const bool is_set = (run_launch = &run_on_thread, resident = 2, true);

}  // namespace
}  // namespace cuda_emulation

// In place of the C library's, for this library alone.
extern "C" [[gnu::visibility("hidden")]] void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                            const char*) {
    std::fprintf(stderr, "%s:%u: assertion failed: %s\n", file, line, assertion);
    if (!cuda_emulation::current) std::abort();
    cuda_emulation::has_failed = true;
    cuda_emulation::jump(cuda_emulation::scheduler);
}
