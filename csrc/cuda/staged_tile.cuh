// Few classes: a block brings the rows of its threads to shared memory with accesses of 16 bytes, whatever the number
// of classes; each thread then has a row of its own there, as floats whatever the dtype.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/resident_row.cuh"

namespace fused_losses::cuda {

class StagedTile {
public:
    // Rows are an odd number of words apart: threads that read the same class of their rows use different banks.
    static constexpr int kSize = kBlock * (kStagedClasses + 1);

    FL_DEVICE StagedTile(float (&memory)[kSize], const RowProblem& problem)
        : p(problem), x(memory), classes(static_cast<int>(p.num_classes)), pitch(classes | 1) {}

    FL_DEVICE float* row(int i) const { return x + i * pitch; }
    FL_DEVICE RowSlice<float> slice(int i) const { return {row(i), 1, 0, classes}; }

    // Calls body(first row, rows) for the tiles of this block, with barriers between them.
    template <class Body>
    FL_DEVICE void for_each(Body body) const {
        const std::int64_t rows = p.rows(), step = std::int64_t(gridDim.x) * kBlock;
        for (std::int64_t first = std::int64_t(blockIdx.x) * kBlock; first < rows; first += step) {
            body(first, static_cast<int>(rows - first < kBlock ? rows - first : kBlock));
            __syncthreads();  // the next tile may be read
        }
    }

    FL_DEVICE void read_logits(std::int64_t first, int rows) const {
        with_stored([&]<class Stored>() { read(as<Stored>(p.logits) + first * classes, rows); });
    }
    FL_DEVICE void write_gradient(std::int64_t first, int rows) const {
        with_stored([&]<class Stored>() { write(static_cast<Stored*>(p.grad) + first * classes, rows); });
    }

private:
    // A branch of the whole grid: what comes between reading and writing is compiled once for all dtypes.
    template <class Body>
    FL_DEVICE void with_stored(Body body) const {
        switch (p.dtype) {
            case Dtype::kFloat64: return;  // has no tiles
            case Dtype::kFloat32: return body.template operator()<float>();
            case Dtype::kFloat16: return body.template operator()<Half>();
            case Dtype::kBFloat16: return body.template operator()<BFloat16>();
        }
    }

    template <class Stored>
    FL_DEVICE void read(const Stored* from, int rows) const {
        walk_vectors(from, rows * classes, true, threadIdx.x, kBlock, [&]<int kCount>(Count<kCount>, int e) {
            float values[kCount];
            load(from + e, values);
            each<kCount>(e, [&](int k, float& place) { place = values[k]; });
        });
    }

    template <class Stored>
    FL_DEVICE void write(Stored* to, int rows) const {
        walk_vectors(to, rows * classes, true, threadIdx.x, kBlock, [&]<int kCount>(Count<kCount>, int e) {
            float values[kCount];
            each<kCount>(e, [&](int k, float& place) { values[k] = place; });
            store(to + e, values);
        });
    }

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

    const RowProblem& p;
    float* const x;
    const int classes, pitch;
};

}  // namespace fused_losses::cuda
