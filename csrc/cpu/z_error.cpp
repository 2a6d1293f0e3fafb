// Z-Error operators on the CPU. Rows are split into chunks that depend on the problem alone, and what chunks found is
// combined in their order: the same bits for any number of threads.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "z_error/driver.h"
#include "z_error/rows.h"

namespace fused_losses {
namespace {

using z_error::Row;

constexpr std::int64_t kChunkRows = 4096;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Calls body(chunk, first row, end) for every chunk.
template <class Body>
void for_each_chunk(std::int64_t rows, std::int64_t chunk_rows, const Body& body) {
    at::parallel_for(0, divide_up(rows, chunk_rows), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk)
            body(chunk, chunk * chunk_rows, std::min(rows, (chunk + 1) * chunk_rows));
    });
}

void moments(const ZProblem& p, double* out) {
    // Every chunk has sums for every group: few chunks where there are many groups.
    constexpr std::int64_t max_chunks = 64;
    const std::int64_t rows = p.rows(), groups = p.num_groups;
    const std::int64_t chunk_rows = std::max({kChunkRows, 2 * groups, divide_up(rows, max_chunks)});
    const std::int64_t chunks = divide_up(rows, chunk_rows);
    std::vector<ShiftedSums> sums(chunks * groups);
    for_each_chunk(rows, chunk_rows, [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        ShiftedSums* const of_group = sums.data() + chunk * groups;
        for (std::int64_t n = begin; n < end; ++n) {
            const Row row(p, n);
            const std::int64_t group = z_error::group_of(p, row);
            if (group < 0) continue;
            const double score = z_error::score_of(p, row, group);
            if (z_error::is_finite(score)) of_group[group].push(score);
        }
    });
    at::parallel_for(0, groups, 1024, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t group = begin; group < end; ++group) {
            Moments total;
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) total.merge(sums[chunk * groups + group].moments());
            out[group] = total.count;
            out[groups + group] = total.mean;
            out[2 * groups + group] = total.m2;
        }
    });
}

void mask(const ZProblem& p) {
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        for (std::int64_t n = begin; n < end; ++n) z_error::mask_row(p, Row(p, n));
    });
}

template <class A>
void loss_as(const ZProblem& p) {
    struct Sums {
        double value = 0, weight = 0;
    };
    std::vector<Sums> sums(divide_up(p.rows(), kChunkRows));
    A* const row_values = static_cast<A*>(p.row_values);
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t chunk, std::int64_t begin, std::int64_t end) {
        Sums local;
        for (std::int64_t n = begin; n < end; ++n) {
            const Row row(p, n);
            const auto share = z_error::share_of<A>(p, row, z_error::mask_row(p, row));
            if (row_values) row_values[n] = share.value;
            local.value += static_cast<double>(share.value);
            local.weight += static_cast<double>(share.weight);
        }
        sums[chunk] = local;
    });
    Sums total;
    for (const Sums& s : sums) {
        total.value += s.value;
        total.weight += s.weight;
    }
    *static_cast<A*>(p.denominator) = static_cast<A>(total.weight);
    if (p.reduction == Reduction::kMean) total.value = total.weight == 0 ? 0.0 : total.value / total.weight;
    if (p.reduction != Reduction::kNone) *static_cast<A*>(p.loss) = static_cast<A>(total.value);
}

template <class A>
void gradient_as(const ZProblem& p) {
    for_each_chunk(p.rows(), kChunkRows, [&](std::int64_t, std::int64_t begin, std::int64_t end) {
        for (std::int64_t n = begin; n < end; ++n)
            z_error::write(p.grad, p.input.type, n, z_error::gradient_of<A>(p, Row(p, n)));
    });
}

void loss(const ZProblem& p) { p.acc_is_double ? loss_as<double>(p) : loss_as<float>(p); }

void gradient(const ZProblem& p) { p.acc_is_double ? gradient_as<double>(p) : gradient_as<float>(p); }

}  // namespace

ZErrorDriver cpu_z_error() { return {&moments, &mask, &loss, &gradient}; }

}  // namespace fused_losses
