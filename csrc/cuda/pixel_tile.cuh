// Rows whose classes are far apart, such as the pixels of NCHW: neighbouring threads have neighbouring rows. With a
// tile [classes][pixels] of them in shared memory they are read from device memory once, by 16 bytes, and several
// threads may share a pixel.
#pragma once

#include "cuda/resident_row.cuh"

namespace fused_losses::cuda {

template <class Stored>
class PixelTiles {
    using A = acc_t<Stored>;

public:
    FL_DEVICE explicit PixelTiles(const RowArgs<A>& args)
        : p(args.problem), pitch(args.residence.pitch), column(pitch > 0 ? args.residence.pixels : kBlock) {}

    // Calls body(column, row, target, slice, exists). All threads of the block take part in reductions over a tile;
    // those without a pixel of their own see another one.
    template <class Body>
    FL_DEVICE void for_each(Body body) const {
        const std::int64_t per_image = pitch > 0 ? p.inner : p.rows(), images = pitch > 0 ? p.outer : 1;
        const std::int64_t tiles_per_image = (per_image + column.pixels - 1) / column.pixels;
        for (std::int64_t tile = blockIdx.x; tile < images * tiles_per_image; tile += gridDim.x) {
            const std::int64_t image = images == 1 ? 0 : tile / tiles_per_image;
            const std::int64_t begin = (tile - image * tiles_per_image) * column.pixels;
            const std::int64_t first = image * per_image + begin, left = per_image - begin;
            const int count = left < column.pixels ? static_cast<int>(left) : column.pixels;
            const bool exists = column.pixel < count;
            const Row row = row_at(p, exists ? first + column.pixel : first);
            RowSlice<Stored> slice = whole_row<Stored>(p, row);
            if (pitch > 0) {
                const Stored* const from = slice.logits - (exists ? column.pixel : 0);
                Stored* const to = reinterpret_cast<Stored*>(dynamic_shared) + misalignment(from);
                __syncthreads();  // the previous tile has been used
                copy(from, to, count);
                slice.logits = to + (exists ? column.pixel : 0);
                slice.stride = pitch;
            } else if (!exists) {
                continue;
            }
            body(column, row, exists ? target_of(p, row) : Target{0, true}, slice, exists);
        }
    }

private:
    // The pitch leaves every class as misaligned as it is in the image.
    FL_DEVICE void copy(const Stored* from, Stored* to, int count) const {
        const int threads = column.pixels / kVector<Stored>, classes = static_cast<int>(p.num_classes);
        for (int c = threadIdx.x / threads; c < classes; c += kBlock / threads)
            begin_copy(p, from + c * p.logits_class_stride, to + c * pitch, count, threadIdx.x % threads, threads);
        end_copies();
        __syncthreads();
    }

    const RowProblem& p;
    const int pitch;
    const Column column;
};

}  // namespace fused_losses::cuda
