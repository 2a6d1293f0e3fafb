// Rows that stay in shared memory while their passes run and their gradient is written, so that they are read from
// device memory once; the next row is copied meanwhile where there is room for two.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/team.cuh"

namespace fused_losses::cuda {

extern __shared__ uint4 dynamic_shared[];

// Begins to copy `count` logits to shared memory, by `threads` threads that go on meanwhile. Both places are misaligned
// alike. Only whole pieces of 16 bytes are copied, with what else is in the first and the last of them, whatever the
// alignment; but nothing from outside the tensor, to whose ends single elements go.
//
// These are the only bytes beside a row's own that any kernel reads: those of the row's first and last 16 aligned bytes
// that lie between the first and the last logit of the tensor, where a view may have gaps that nobody has written. They
// reach no result.
template <class Stored>
FL_DEVICE void begin_copy(const RowProblem& p, const Stored* from, Stored* to, int count, int lane, int threads) {
    constexpr int n = kVector<Stored>;
    const Stored* const begin = as<Stored>(p.logits);
    const Stored* const end =
        begin + p.logits_stride.at(p.outer - 1, p.inner - 1) + (p.num_classes - 1) * p.logits_class_stride + 1;
    const int before = misalignment(from);
    for (int i = lane * n; i < before + count; i += threads * n) {
        const Stored* const x = from - before + i;
        Stored* const y = to - before + i;
        if (x >= begin && x + n <= end)
            __pipeline_memcpy_async(y, x, 16);
        else
            for (int k = 0; k < n; ++k)
                if (x + k >= begin && x + k < end) y[k] = x[k];
    }
}

// Waits for all copies that this thread has begun; others see them after a barrier.
FL_DEVICE void end_copies() {
    __pipeline_commit();
    __pipeline_wait_prior(0);
}

// The classes [first, first + count) of a row, where the threads that share them find them.
template <class Stored>
struct RowSlice {
    const Stored* logits;  // of class `first`
    std::int64_t stride;   // between classes
    int first, count;
};

template <class Stored>
FL_DEVICE const Stored* logits_of(const RowProblem& p, const Row& row) {
    return as<Stored>(p.logits) + p.logits_stride.at(row.outer, row.inner);
}

template <class Stored>
FL_DEVICE Stored* gradient_row(const RowProblem& p, const Row& row) {
    return static_cast<Stored*>(p.grad) + p.grad_stride.at(row.outer, row.inner);
}

// A whole row where it lies.
template <class Stored>
FL_DEVICE RowSlice<Stored> whole_row(const RowProblem& p, const Row& row) {
    return {logits_of<Stored>(p, row), p.logits_class_stride, 0, static_cast<int>(p.num_classes)};
}

// Any logit of the row, from the slice if it is there.
template <class Stored>
FL_DEVICE acc_t<Stored> logit_of(const RowProblem& p, const Row& row, const RowSlice<Stored>& slice, int cls) {
    const bool here = static_cast<unsigned>(cls - slice.first) < static_cast<unsigned>(slice.count);
    return to_acc(here ? slice.logits[(cls - slice.first) * slice.stride]
                       : logits_of<Stored>(p, row)[cls * p.logits_class_stride]);
}

// A team's rows, one after the other.
template <class Stored, class Team>
class RowReader {
    using A = acc_t<Stored>;

public:
    FL_DEVICE RowReader(const RowArgs<A>& args, const Team& team)
        : p(args.problem), capacity(args.residence.capacity), buffers(args.residence.buffers), group(team) {}

    // Calls body(row, target, slice, exists) for each row, by all threads of the group, and by whole warps: groups that
    // share one see another row, as if it were ignored, where they have none left.
    template <class Body>
    FL_DEVICE void for_each(Body body) {
        const std::int64_t rows = p.rows(), step = group.count(), ahead = group.number() - group.first_in_warp();
        std::int64_t number = group.number();
        if (is_to_copy(number)) begin(number);
        while (number - ahead < rows) {
            const std::int64_t next = number + step;
            const bool continues = is_to_copy(next);  // asked now: the answer comes while this row's copy arrives
            const bool exists = number < rows;
            const Row row = row_at(p, exists ? number : 0);
            const RowSlice<Stored> slice = slice_of(row, arrived());
            if (buffers > 1 && continues) begin(next);
            body(row, exists ? target_of(p, row) : Target{0, true}, slice, exists);
            if (buffers == 1 && is_resident()) {
                group.sync();  // everybody is done with the buffer
                if (continues) begin(next);
            }
            number = next;
        }
    }

private:
    FL_DEVICE bool is_resident() const { return capacity > 0; }

    FL_DEVICE bool is_to_copy(std::int64_t number) const {
        return is_resident() && number < p.rows() && !target_of(p, row_at(p, number)).ignored;
    }

    // Blocks of a cluster share the row at 16-byte boundaries, whatever its alignment.
    FL_DEVICE RowSlice<Stored> slice_of(const Row& row, int at) const {
        RowSlice<Stored> slice = whole_row<Stored>(p, row);
        if (!is_resident()) return slice;
        const int start = misalignment(slice.logits), rank = cluster_rank();
        slice.first = max(0, rank * capacity - start);
        slice.count = max(0, min(slice.count, (rank + 1) * capacity - start) - slice.first);
        // Aligned as in the row, so that vectors are vectors in both places.
        slice.logits = memory() + at + (slice.first == 0 ? start : 0);
        return slice;
    }

    FL_DEVICE void begin(std::int64_t number) const {
        const Row row = row_at(p, number);
        const RowSlice<Stored> slice = slice_of(row, place());
        begin_copy(p, logits_of<Stored>(p, row) + slice.first, const_cast<Stored*>(slice.logits), slice.count,
                   group.lane, group.threads);
    }

    // Waits for the row that was begun last; for the whole group. Returns where it is and turns to the other buffer.
    FL_DEVICE int arrived() {
        if (!is_resident()) return 0;
        end_copies();
        group.sync();
        const int here = place();
        if (buffers > 1) turn ^= 1;
        return here;
    }

    // In memory(), of the group's buffer for the next row.
    FL_DEVICE int place() const { return (static_cast<int>(threadIdx.x) / group.threads * buffers + turn) * capacity; }

    static FL_DEVICE Stored* memory() { return reinterpret_cast<Stored*>(dynamic_shared); }

    const RowProblem& p;
    const int capacity, buffers;
    const Team& group;
    int turn = 0;
};

}  // namespace fused_losses::cuda
