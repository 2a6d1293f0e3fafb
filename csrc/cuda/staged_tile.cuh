// Few classes: a block brings the rows of its threads to shared memory with accesses of 16 bytes, whatever the number
// of classes; each thread then has a row of its own there.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/resident_row.cuh"

namespace fused_losses::cuda {

template <class Stored>
class StagedTile {
    using A = acc_t<Stored>;

public:
    // Rows are an odd number of words apart: threads that read the same class of their rows use different banks.
    static constexpr int kSize = kBlock * (kStagedClasses + 1);

    FL_DEVICE StagedTile(A (&memory)[kSize], int num_classes)
        : x(memory), classes(num_classes), pitch(num_classes | 1) {}

    FL_DEVICE A* row(int i) const { return x + i * pitch; }
    FL_DEVICE RowSlice<A> slice(int i) const { return {row(i), 1, 0, classes}; }

    FL_DEVICE void read(const Stored* from, int rows) const {
        walk_classes<kBlock>(from, rows * classes, true, threadIdx.x, [&]<int kCount>(Count<kCount>, int e) {
            A values[kCount];
            load(from + e, values);
            each<kCount>(e, [&](int k, A& place) { place = values[k]; });
        });
    }

    FL_DEVICE void write(Stored* to, int rows) const {
        walk_classes<kBlock>(to, rows * classes, true, threadIdx.x, [&]<int kCount>(Count<kCount>, int e) {
            A values[kCount];
            each<kCount>(e, [&](int k, A& place) { values[k] = place; });
            store(to + e, values);
        });
    }

private:
    // body(k, element e + k)
    template <int kCount, class Body>
    FL_DEVICE void each(int e, Body body) const {
        int row = static_cast<unsigned>(e) / static_cast<unsigned>(classes), c = e - row * classes;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            body(k, x[row * pitch + c]);
            if (++c == classes) c = 0, ++row;
        }
    }

    A* const x;
    const int classes, pitch;
};

// Calls body(first row, rows) for the tiles of this block, with barriers between them.
template <class Body>
FL_DEVICE void for_each_tile(const RowProblem& p, Body body) {
    const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * kBlock;
    for (std::int64_t first = std::int64_t(blockIdx.x) * kBlock; first < rows; first += step) {
        body(first, static_cast<int>(rows - first < kBlock ? rows - first : kBlock));
        __syncthreads();  // the next tile may be read
    }
}

}  // namespace fused_losses::cuda
