// Device memory as blocks see it that do not wait for each other: what lacks a fence, or reads an old line of the
// cache, shows in results.
#include <unordered_map>

#include "cuda_compiled/memory.h"

namespace cuda_emulation {
namespace {

constexpr u64 kWord = 4;
constexpr std::size_t kMostStores = 20'000;  // that a block holds back

// Bytes of a word that a thread has stored and others may not see yet.
struct Store {
    unsigned char bytes[kWord];
    bool is_set[kWord] = {};
    int thread;
    std::uint64_t period, sync;  // of the block, of the thread

    bool is_by_same() const {
        return thread == current->number && period == current_block->period && sync == current->sync;
    }
    // Whether the current thread knows of it: by itself, or by a barrier.
    bool is_known() const {
        const bool passed_warp_barrier = thread / 32 == current->number / 32 && sync != current->sync;
        return thread == current->number || period != current_block->period || passed_warp_barrier;
    }
    void publish(u64 word) const {
        for (u64 i = 0; i < kWord; ++i)
            if (is_set[i]) *reinterpret_cast<unsigned char*>(word * kWord + i) = bytes[i];
    }
};

struct View {
    std::unordered_map<u64, Store> stores;  // by word
    std::unordered_map<u64, u32> cached;
};

std::unordered_map<unsigned, View>& views() {
    static auto& of_blocks = *new std::unordered_map<unsigned, View>;
    return of_blocks;
}
View& my_view() { return views()[current_block->index.x]; }

void publish_all(View& view) {
    for (const auto& [word, store] : view.stores) store.publish(word);
    view.stores.clear();
}

const bool is_set = (block_ends = [] {
    const auto found = views().find(current_block->index.x);
    if (found == views().end()) return;
    publish_all(found->second);
    views().erase(found);
}, true);

// The word as it was when the block read it before, by chance.
void take_cached(View& view, u64 word, unsigned char* to) {
    u32 now;
    std::memcpy(&now, to, kWord);
    const auto found = view.cached.find(word);
    if (found == view.cached.end()) {
        if (one_in(4)) view.cached[word] = now;
    } else if (one_in(2)) {
        std::memcpy(to, &found->second, kWord);
    }
}

}  // namespace

void load_from_device(u64 at, std::size_t size, bool bypasses, unsigned char* to) {
    View& view = my_view();
    std::memcpy(to, reinterpret_cast<const void*>(at), size);
    for (u64 word = at / kWord; word * kWord < at + size; ++word) {
        const bool is_whole = word * kWord >= at && (word + 1) * kWord <= at + size;
        if (!bypasses && is_whole) take_cached(view, word, to + (word * kWord - at));
        const auto found = view.stores.find(word);
        if (found == view.stores.end()) continue;
        for (u64 i = 0; i < kWord; ++i) {
            const u64 byte = word * kWord + i;
            if (found->second.is_set[i] && byte >= at && byte < at + size) to[byte - at] = found->second.bytes[i];
        }
    }
}

void store_to_device(u64 at, std::size_t size, const unsigned char* from) {
    View& view = my_view();
    if (view.stores.size() > kMostStores) publish_all(view);
    for (u64 byte = at; byte < at + size; ++byte) {
        const u64 word = byte / kWord;
        Store& store = view.stores[word];
        if (!store.is_by_same()) {
            store.publish(word);
            store =
                Store{.bytes = {}, .thread = current->number, .period = current_block->period, .sync = current->sync};
            view.cached.erase(word);
        }
        store.bytes[byte % kWord] = from[byte - at];
        store.is_set[byte % kWord] = true;
    }
}

void publish(u64 at, std::size_t size) {
    View& view = my_view();
    for (u64 word = at / kWord; word * kWord < at + size; ++word) {
        const auto found = view.stores.find(word);
        if (found == view.stores.end()) continue;
        found->second.publish(word);
        view.stores.erase(found);
    }
}

void device_fence() {
    View& view = my_view();
    view.cached.clear();
    std::erase_if(view.stores, [](const auto& entry) {
        if (!entry.second.is_known()) return false;
        entry.second.publish(entry.first);
        return true;
    });
}

}  // namespace cuda_emulation
