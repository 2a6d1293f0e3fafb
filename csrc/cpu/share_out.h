// Work of equal pieces for torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace fused_losses {

// Calls body(begin, end) for runs of pieces that together are [0, count); fewer than `grain` are not worth a thread.
// Every thread begins with a share of its own, one stretch of memory, then takes over what others have left of theirs:
// a core that is slow or busy otherwise holds up the whole call (measured on shared cores: by a tenth to a third).
template <class Body>
void share_out(std::int64_t count, std::int64_t grain, const Body& body) {
    constexpr std::int64_t kRunsPerShare = 16;
    struct alignas(64) Share {  // a cache line
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    const std::int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const std::int64_t shares = std::min(threads, (count + grain - 1) / grain);
    if (count == 0) return;
    if (shares <= 1) return body(0, count);

    std::vector<Share> all(shares);
    for (std::int64_t s = 0; s < shares; ++s) all[s].next = count * s / shares, all[s].end = count * (s + 1) / shares;
    const std::int64_t run = std::max(grain, count / (shares * kRunsPerShare));
    at::parallel_for(0, shares, 1, [&](std::int64_t own, std::int64_t) {
        for (std::int64_t s = 0; s < shares; ++s) {
            Share& share = all[(own + s) % shares];
            for (std::int64_t begin; (begin = share.next.fetch_add(run, std::memory_order_relaxed)) < share.end;)
                body(begin, std::min(begin + run, share.end));
        }
    });
}

}  // namespace fused_losses
