// Work of equal pieces for torch's threads, which steal from each other what is left.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#include "core/row_problem.h"
#include "ops/tensor.h"

namespace fused_losses {

// Calls body(begin, end) for runs of pieces that together are [0, count); fewer than `grain` are not worth a thread.
// Every thread begins with a range of its own, one stretch of memory, then takes runs from the ranges of others:
// without that, a core that is slow or busy holds up the whole call (measured on shared cores: by a tenth to a third).
template <class Body>
void for_stealing(std::int64_t count, std::int64_t grain, const Body& body) {
    constexpr std::int64_t kRunsPerRange = 16;
    struct alignas(64) Range {  // a cache line
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    if (count == 0) return;
    std::uint32_t threads = 1;
    if (count > grain) torch_get_num_threads(&threads);
    const std::int64_t workers = std::min<std::int64_t>(threads, divide_up(count, grain));
    if (workers <= 1) return body(0, count);

    std::vector<Range> ranges(workers);
    for (std::int64_t w = 0; w < workers; ++w)
        ranges[w].next = count * w / workers, ranges[w].end = count * (w + 1) / workers;
    const std::int64_t run = std::max(grain, count / (workers * kRunsPerRange));
    std::exception_ptr thrown;  // by a body, which has no memory for its scratch, say: torch would only return a code
    std::atomic_flag has_thrown;
    const auto work = [&](std::int64_t worker) {
        try {
            for (std::int64_t w = 0; w < workers; ++w) {
                Range& range = ranges[(worker + w) % workers];
                for (std::int64_t begin; (begin = range.next.fetch_add(run, std::memory_order_relaxed)) < range.end;)
                    body(begin, std::min(begin + run, range.end));
            }
        } catch (...) {
            if (!has_thrown.test_and_set()) thrown = std::current_exception();
        }
    };
    // Where torch is in a parallel region already, it calls this once, for all ranges.
    const auto call = [](std::int64_t worker, std::int64_t, void* context) {
        (*static_cast<decltype(work)*>(context))(worker);
    };
    check_torch(torch_parallel_for(0, workers, 1, call, const_cast<void*>(static_cast<const void*>(&work))),
                "run a loop on its threads");
    if (thrown) std::rethrow_exception(thrown);
}

}  // namespace fused_losses
