// Finds races in shared memory: two threads of a block access the same bytes, one of them writes, and no barrier keeps
// the accesses apart. They are found in whatever order the threads happen to run, and even where each run gives the
// right result. What keeps accesses apart is a barrier of the block or the cluster and, within a warp, __syncwarp():
// shuffles and votes wait for each other, but promise nothing about memory.
//
// Kernels compiled with -fsanitize=thread call a function at every access. Those functions are in races.cpp; the
// sanitizer's own library, which knows no warps, is not linked.
#pragma once

#include <cstddef>

namespace cuda_emulation {

// What a compiler does not see: an asynchronous copy.
void note_access(const void* place, std::size_t size, bool writes);

// Atomic functions do not race with each other.
inline bool in_atomic_function = false;

}  // namespace cuda_emulation
