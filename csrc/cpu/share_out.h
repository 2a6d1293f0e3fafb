// Work of equal pieces for torch's threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

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
    if (count == 0) return;
    std::uint32_t threads = 1;
    if (count > grain) torch_get_num_threads(&threads);
    const std::int64_t shares = std::min<std::int64_t>(threads, (count + grain - 1) / grain);
    if (shares <= 1) return body(0, count);

    std::vector<Share> all(shares);
    for (std::int64_t s = 0; s < shares; ++s) all[s].next = count * s / shares, all[s].end = count * (s + 1) / shares;
    const std::int64_t run = std::max(grain, count / (shares * kRunsPerShare));
    const auto work = [&](std::int64_t own) {
        for (std::int64_t s = 0; s < shares; ++s) {
            Share& share = all[(own + s) % shares];
            for (std::int64_t begin; (begin = share.next.fetch_add(run, std::memory_order_relaxed)) < share.end;)
                body(begin, std::min(begin + run, share.end));
        }
    };
    // Where torch is in a parallel region already, it calls this once, for all shares.
    const auto call = [](std::int64_t own, std::int64_t, void* context) {
        (*static_cast<decltype(work)*>(context))(own);
    };
    torch_parallel_for(0, shares, 1, call, const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace fused_losses
