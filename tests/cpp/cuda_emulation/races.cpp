#include "races.h"

#include "scheduler.h"

namespace cuda_emulation {
namespace {

constexpr std::size_t kGrain = 2;  // bytes; no two threads share them

// Small, as these tables are many times the size of shared memory. What earlier blocks have left here means nothing:
// periods are never used twice.
struct Access {
    std::uint64_t period : 32, sync : 22, thread : 10;  // of the block, of the thread

    bool operator==(const Access&) const = default;
    bool has_warp_of(const Access& other) const { return thread / 32 == other.thread / 32; }
    bool races_with(const Access& now) const {
        return period == now.period && thread != now.thread && (!has_warp_of(now) || sync == now.sync);
    }
};

// The last accesses to a grain. Of readers, the last one, another one, and one of another warp: with any writer, two of
// them at least are somebody else.
struct Record {
    Access write, read, other_read, read_elsewhere;
};

std::vector<Record>& records(std::size_t size) {
    static std::vector<std::vector<Record>> of_blocks;
    const auto slot = static_cast<std::size_t>(current_block - blocks.data());
    if (of_blocks.size() <= slot) of_blocks.resize(slot + 1);
    if (of_blocks[slot].empty()) of_blocks[slot].resize(size / kGrain + 1);
    return of_blocks[slot];
}

[[noreturn]] void complain(const char* what, const Access& before, std::size_t offset) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "a race in shared memory: thread %d %s by thread %d at byte %zu, without a barrier between",
                  int(before.thread), what, current->number, offset);
    die(text);
}

void note(Record& record, const Access& now, std::size_t offset, bool writes) {
    if (record.write.races_with(now))
        complain(writes ? "wrote what is overwritten" : "wrote what is read", record.write, offset);
    if (writes) {
        for (const Access& read : {record.read, record.other_read, record.read_elsewhere})
            if (read.races_with(now)) complain("read what is overwritten", read, offset);
        record.write = now;
    } else if (record.read != now) {
        if (!record.read.has_warp_of(now)) record.read_elsewhere = record.read;
        if (record.read.thread != now.thread) record.other_read = record.read;
        record.read = now;
    }
}

[[gnu::noinline]] void note_shared(std::size_t offset, std::size_t size, bool writes) {
    const Access now{current_block->period, current->sync, static_cast<unsigned>(current->number)};
    Record* const all = records(shared_memory().size).data();
    for (std::size_t grain = offset / kGrain; grain * kGrain < offset + size; ++grain)
        note(all[grain], now, grain * kGrain, writes);
}

}  // namespace

void note_access(const void* place, std::size_t size, bool writes) {
    if (!current || !current_block || in_atomic_function) return;  // the host's part of a launch
    const Span& shared = shared_memory();
    const auto offset = static_cast<std::size_t>(static_cast<const char*>(place) - static_cast<char*>(shared.data));
    if (offset < shared.size) note_shared(offset, size, writes);
}

}  // namespace cuda_emulation

// What the compiler calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
char __tsan_atomic8_load(const volatile char* place, int) { return *place; }  // of static variables: are they there?
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define FL_ACCESS(size)                                                                                \
    void __tsan_read##size(void* place) { cuda_emulation::note_access(place, size, false); }           \
    void __tsan_write##size(void* place) { cuda_emulation::note_access(place, size, true); }           \
    void __tsan_unaligned_read##size(void* place) { cuda_emulation::note_access(place, size, false); } \
    void __tsan_unaligned_write##size(void* place) { cuda_emulation::note_access(place, size, true); }
FL_ACCESS(1)
FL_ACCESS(2)
FL_ACCESS(4)
FL_ACCESS(8)
FL_ACCESS(16)
void __tsan_read_range(void* place, std::size_t size) { cuda_emulation::note_access(place, size, false); }
void __tsan_write_range(void* place, std::size_t size) { cuda_emulation::note_access(place, size, true); }
}
