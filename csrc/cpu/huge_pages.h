// Fresh memory in pages of 2 MiB. An allocator hands out a large gradient as memory that was never touched, and with
// pages of 4 KiB the kernel's work on the first access of each (0.6 us) takes longer than computing the gradient.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "core/row_problem.h"

namespace fused_losses {

// A hint: without support, or where an administrator has turned it off, nothing changes.
inline void prefer_huge_pages(void* begin, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t kHugePage = 2 << 20;
    constexpr std::int64_t kWorthIt = 4 << 20;
    if (bytes < kWorthIt) return;
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    const std::uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
    const std::uintptr_t last = (address + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// For the gradient of a call: memory that has just been allocated, without gaps.
inline void prefer_huge_pages(const RowProblem& p) {
    if (p.grad) prefer_huge_pages(p.grad, p.rows() * p.num_classes * bytes_of(p.dtype));
}

}  // namespace fused_losses
