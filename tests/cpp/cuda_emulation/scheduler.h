// Runs the threads of a CUDA launch on the host, one at a time: each is a fiber that gives way where it has to wait for
// others, in an order drawn from a seed. What is left out of a kernel, a barrier above all, then shows in its results;
// or races.h finds it, where every order that can be had here gives the right ones.
//
// - Shared memory is thread_local memory of the one OS thread that runs all launches: its contents are exchanged when
//   another block takes over. A block begins with 0xff bytes, a NaN in every format, or sometimes with zeros, which are
//   `false`, too.
// - Blocks begin in random order, `resident` of them at a time; all of them in a cooperative launch or one of clusters.
// - A launch that cannot go on, because threads wait for some that never come, or come to another place, aborts with a
//   list of who waits where. So does one that spins for ever.
//
// Not emulated, so errors in it are not found: the memory model (every write is seen at once by all: no missing fence
// shows), caches and alignment of accesses (but the sanitizers see those of vectors), lanes in lockstep, clusters of
// more than one dimension, asynchronous copies in groups and TMA, tensor cores, textures, PTX, streams (a launch has
// ended when it returns), fast mathematics but for the instructions in approximate_instructions.h, out-of-bounds
// accesses within the static shared memory other than those -fsanitize=bounds knows, limits of registers and of the
// grid. A spin loop must call __nanosleep or an atomic function. The program must be linked dynamically, without other
// thread_local variables (clang: -shared-libsan).
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "state.h"

namespace cuda_emulation {

// ---- Shared memory -------------------------------------------------------------------------------------------------

struct Span {
    void* data = nullptr;
    std::size_t size = 0;
};

// The thread_local variables of the object that this is part of, a program or a library, in the thread that asks first.
inline Span find_shared_memory() {
    Span found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* result) {
            Span variables;
            bool is_this = false;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const ElfW(Phdr) & part = info->dlpi_phdr[i];
                const auto distance =
                    reinterpret_cast<std::uintptr_t>(&find_shared_memory) - info->dlpi_addr - part.p_vaddr;
                if (part.p_type == PT_LOAD) is_this |= distance < part.p_memsz;
                if (part.p_type == PT_TLS) variables = {info->dlpi_tls_data, part.p_memsz};
            }
            if (is_this) *static_cast<Span*>(result) = variables;
            return int(is_this);
        },
        &found);
    return found;
}
inline const Span& shared_memory() {
    static const Span shared = find_shared_memory();
    return shared;
}

inline void take_over(Block* next) {
    if (next == current_block) return;
    const Span& shared = shared_memory();
    const auto* bytes = static_cast<const unsigned char*>(shared.data);
    if (current_block) current_block->shared.assign(bytes, bytes + shared.size);
    if (!next->shared.empty())
        std::memcpy(shared.data, next->shared.data(), shared.size);
    else if (shared.size > 0)
        std::memset(shared.data, one_in(3) ? 0 : 0xff, shared.size);
    current_block = next;
    blockIdx = next->index;
}

// ---- Waiting -------------------------------------------------------------------------------------------------------

inline void make_ready(Thread& thread) {
    thread.state = State::kReady;
    current_block->ready.push_back(thread.number);
}

// swapcontext would save the signal mask by a system call at every turn. The compiler wants each half of a jump in a
// function of its own.
[[noreturn, gnu::noinline]] inline void jump(Place& place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] inline void pause() {
    if (__builtin_setjmp(current->place) == 0) jump(scheduler);
}

// Runs `current` until it pauses.
[[gnu::noinline]] inline void resume() {
    if (__builtin_setjmp(scheduler) != 0) return;
    if (std::exchange(current->begun, true)) jump(current->place);
    setcontext(&current->context);
}

// Lets others go first.
inline void yield() {
    current_block->priority[current->number] = --current_block->lowest_priority;
    make_ready(*current);
    pause();
}

// At an atomic function, where blocks may learn of each other: perhaps lets others go first, of another block even.
inline void maybe_yield() {
    if (!one_in(kYieldOneIn)) return;
    if (one_in(2)) stay = 0;
    yield();
}

inline void nap() {
    if (++naps > kEndlessNaps) die("threads wait for ever in loops that call __nanosleep");
    stay = 0;
    yield();
}

inline void wait(State state, const char* function, unsigned mask, std::uint64_t brought, const Location& where) {
    naps = 0;
    current->state = state;
    current->function = function;
    current->where = where;
    current->mask = mask;
    current->brought = brought;
}

inline bool same_place(const Thread& a, const Thread& b) {
    return std::strcmp(a.function, b.function) == 0 && a.where.line() == b.where.line() &&
           a.where.column() == b.where.column() && std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

// Opens the barrier if every thread that has not finished is there.
inline void open_barrier() {
    Block& block = *current_block;
    if (block.at_barrier < block.running) return;
    const Thread* first = nullptr;
    for (const Thread& thread : block.threads) {
        if (thread.state == State::kFinished) continue;
        if (!first) first = &thread;
        if (!same_place(*first, thread)) die("threads of a block meet at different barriers");
    }
    for (Thread& thread : block.threads)
        if (thread.state == State::kAtBarrier) make_ready(thread);
    block.at_barrier = 0;
    block.period = ++periods;
}

inline void wait_for_block(const char* function, const Location& where) {
    wait(State::kAtBarrier, function, 0, 0, where);
    ++current_block->at_barrier;
    open_barrier();
    pause();
}

inline int lane() { return current->number % 32; }

// Waits for the lanes of `mask` and returns what each of them brought. is_barrier: whether it keeps accesses to memory
// apart, too.
inline const std::uint64_t* exchange(const char* function, unsigned mask, std::uint64_t mine, const Location& where,
                                     bool is_barrier = false) {
    Thread* const warp = current - lane();
    wait(State::kInWarp, function, mask, mine, where);
    if (!(mask >> lane() & 1)) die(std::string(function) + ": the mask lacks a lane that takes part");
    const auto lanes = std::min<std::size_t>(32, &current_block->threads.back() - warp + 1);
    if (lanes < 32 && mask >> lanes) die(std::string(function) + ": the mask has lanes that the block has not");
    bool complete = true;
    for (std::size_t i = 0; i < lanes && complete; ++i)
        if (mask >> i & 1)
            complete = warp[i].state == State::kInWarp && warp[i].mask == mask && same_place(warp[i], *current);
    const std::uint64_t sync = is_barrier && complete ? ++periods : 0;
    for (std::size_t to = 0; to < lanes && complete; ++to) {
        if (!(mask >> to & 1)) continue;
        if (is_barrier) warp[to].sync = sync;
        for (std::size_t from = 0; from < lanes; ++from) warp[to].received[from] = warp[from].brought;
        make_ready(warp[to]);
    }
    pause();
    return current->received;
}

// A block that has run to its end is still the current one.
inline void (*block_ends)() = [] {};

// ---- Launches ------------------------------------------------------------------------------------------------------

constexpr std::size_t kStackSize = 64 * 1024, kPage = 4096;

// Stack of one of the threads that can exist at the same time; the page below it is out of bounds.
inline char* stack_of(std::size_t slot) {
    static std::vector<char*> stacks;
    while (stacks.size() <= slot) {
        void* const memory = mmap(nullptr, kPage + kStackSize, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) die("no memory for a thread's stack");
        stacks.push_back(static_cast<char*>(memory) + kPage);
    }
    return stacks[slot];
}

inline void run_thread() {
    kernel();
    naps = 0;
    current->state = State::kFinished;
    --current_block->running;
    open_barrier();
    pause();
}

inline void begin(Block& block, unsigned number, std::size_t slot) {
    const unsigned count = blockDim.x * blockDim.y * blockDim.z;
    block = Block{};
    block.index = {number % gridDim.x, number / gridDim.x % gridDim.y, number / gridDim.x / gridDim.y};
    block.order = Order(random() % 3);
    block.running = count;
    block.period = ++periods;
    block.threads.resize(count);
    block.priority.resize(count);
    std::vector<int> priority_of_warp(count / 32 + 1);
    for (int& priority : priority_of_warp) priority = int(random() % 1000);
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.number = int(i);
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        block.priority[i] = block.order == Order::kByWarp ? priority_of_warp[i / 32] : int(random() % 1000);
        thread.state = State::kReady;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = stack_of(slot * count + i);
        thread.context.uc_stack.ss_size = kStackSize;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
        block.ready.push_back(int(i));
    }
}

// Gives a random thread, or its warp, another priority.
inline void reorder(Block& block) {
    const std::size_t which = random() % block.threads.size();
    const int priority = int(random() % 1000);
    for (Thread& thread : block.threads) {
        const bool chosen =
            block.order == Order::kByWarp ? thread.number / 32 == int(which / 32) : thread.number == int(which);
        if (chosen) block.priority[thread.number] = priority;
    }
}

// Which of those that are ready. Most of the emulation's time is spent here, so races.h does not watch.
[[gnu::no_sanitize("thread")]] inline std::size_t highest(const int* ready, std::size_t count, const int* priority,
                                                          std::size_t at) {
    int most = priority[ready[at]];
    for (std::size_t i = 0; i < count; ++i) {
        if (priority[ready[i]] <= most) continue;
        most = priority[ready[i]];
        at = i;
    }
    return at;
}

inline Thread* next_thread(Block& block) {
    std::size_t at = random() % block.ready.size();
    if (block.order != Order::kAny) {
        if (one_in(kReorderOneIn)) reorder(block);
        at = highest(block.ready.data(), block.ready.size(), block.priority.data(), at);
    }
    std::swap(block.ready[at], block.ready.back());
    Thread* const thread = &block.threads[block.ready.back()];
    block.ready.pop_back();
    return thread;
}

// The block that runs next: for a while the same again, then any other that can go on.
inline Block* next_block() {
    if (current_block && !current_block->ready.empty() && stay-- > 0) return current_block;
    stay = 1l << random() % kLongestStay;
    const std::size_t first = random() % blocks.size();
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        Block& block = blocks[(first + i) % blocks.size()];
        if (!block.ready.empty()) return &block;
    }
    return nullptr;
}

// Runs `body` as every thread of a grid. Blocks are of a cluster by their x.
inline void launch(dim3 grid, dim3 block_size, unsigned cluster, bool cooperative, const std::function<void()>& body) {
    if (current) die("a launch within a launch");
    gridDim = dim3(std::max(std::min(grid.x, largest_grid) / cluster, 1u) * cluster, grid.y, grid.z);
    blockDim = block_size;
    cluster_size = cluster;
    kernel = body;
    std::vector<unsigned> numbers(std::size_t(gridDim.x) * gridDim.y * gridDim.z);
    if (numbers.empty() || block_size.x * block_size.y * block_size.z > 1024) die("a grid without blocks or too large");
    std::iota(numbers.begin(), numbers.end(), 0u);
    std::shuffle(numbers.begin(), numbers.end(), random);
    const std::size_t most = cooperative || cluster > 1 ? numbers.size() : resident;
    const std::size_t at_once = std::min(most, numbers.size());
    blocks.resize(at_once);
    for (std::size_t slot = 0; slot < at_once; ++slot) {
        begin(blocks[slot], numbers.back(), slot);
        numbers.pop_back();
    }
    for (std::size_t alive = at_once; alive > 0;) {
        Block* const next = next_block();
        if (!next) {
            for (Block& block : blocks)
                if (block.running > 0) current_block = &block;
            die("no thread can go on");
        }
        take_over(next);
        current = next_thread(*next);
        threadIdx = current->index;
        resume();
        if (has_failed) break;
        if (next->running > 0) continue;
        if (overlaps && !next->has_waited) die("a block ends that has not waited for the launch before");
        block_ends();
        current_block = nullptr;  // its shared memory is worth nothing
        if (numbers.empty()) {
            --alive;
        } else {
            begin(*next, numbers.back(), std::size_t(next - blocks.data()));
            numbers.pop_back();
        }
    }
    current = nullptr;
    if (has_failed) current_block = nullptr;
}

}  // namespace cuda_emulation
