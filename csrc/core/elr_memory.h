// What a step of early-learning regularisation (losses/elr.h) is given besides its rows. Torch-free.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace fused_losses {

struct ElrMemory {
    void* rows = nullptr;  // [samples][classes], float or BFloat16
    bool is_bfloat16 = false;
    const std::int64_t* place = nullptr;  // of each row's sample, in the order of row numbers
    bool updates = false;
    // Row numbers by place, equal places in their order; null: no sample has two rows.
    const std::int64_t* order = nullptr;
    double beta = 0, lam = 0;
    const void* parameters = nullptr;  // acc [2], on the logits' device; read by the kernel in place of beta and lam
    const void* scale = nullptr;       // acc [rows], what each row's gradient is multiplied by; null means 1
};

inline namespace FL_ISA {

// Rows of one sample all see what was remembered before; the last usable one is remembered. So they are one unit of
// work, that of the first of them. take(row, writes) computes a row, changes the memory if it is to, and returns
// whether the row is usable.
template <class Take>
FL_HD void take_unit(const ElrMemory& m, std::int64_t unit, std::int64_t rows, Take take) {
    const auto row = [&](std::int64_t i) { return m.order ? m.order[i] : i; };
    std::int64_t end = unit + 1, last = -1;
    if (m.order) {
        const auto place = [&](std::int64_t i) { return m.place[row(i)]; };
        if (unit > 0 && place(unit - 1) == place(unit)) return;
        while (end < rows && place(end) == place(unit)) ++end;
    }
    const bool alone = end == unit + 1;
    for (std::int64_t i = unit; i <= end; ++i) {  // one call: compilers put its body here
        const bool again = i == end;
        if (again && (alone || !m.updates || last < 0)) break;
        const std::int64_t next = again ? last : row(i);
        if (take(next, m.updates && (alone || again))) last = next;
    }
}

}  // namespace FL_ISA
}  // namespace fused_losses
