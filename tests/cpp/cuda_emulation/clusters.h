// Clusters of blocks, on top of scheduler.h: their barrier, and the shared memory of other blocks.
#pragma once

#include "scheduler.h"

namespace cuda_emulation {

inline Block& block_of_cluster(unsigned rank) {
    const unsigned number = current_block->index.x / cluster_size * cluster_size + rank;
    for (Block& block : blocks)
        if (rank < cluster_size && block.index.x == number) return block;
    die("no such block in the cluster");
}

// A shared variable of another block of the cluster.
inline void* of_block(void* mine, unsigned rank) {
    Block& block = block_of_cluster(rank);
    if (&block == current_block) return mine;
    if (block.shared.empty() || block.running == 0) die("a block of the cluster has not begun or has finished");
    const auto offset = static_cast<unsigned char*>(mine) - static_cast<unsigned char*>(shared_memory().data);
    return block.shared.data() + offset;
}

// Opens the barrier of the cluster if all its threads are there.
inline void wait_for_cluster(const char* function, const Location& where) {
    wait(State::kAtCluster, function, 0, 0, where);
    ++current_block->at_cluster;
    bool complete = true;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
        const Block& block = block_of_cluster(rank);
        complete &= block.at_cluster == block.running;
    }
    for (unsigned rank = 0; rank < cluster_size && complete; ++rank) {
        Block& block = block_of_cluster(rank);
        block.at_cluster = 0;
        block.period = ++periods;
        for (Thread& thread : block.threads) {
            if (thread.state != State::kAtCluster) continue;
            thread.state = State::kReady;
            block.ready.push_back(thread.number);
        }
    }
    pause();
}

}  // namespace cuda_emulation
