// cpu/vec.h and cpu/memory.h: memory accesses of every kind, reductions and masks; and core/numeric.h on vectors, which
// must convert float16 and bfloat16 to the same bits as on scalars, but for those of NaNs.
#include "cpu/memory.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/transpose.h"

namespace {

using namespace fused_losses;
using fused_losses_test::check;
using fused_losses_test::Random;

template <class T>
bool same_bits(T a, T b) {
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// Of two numbers that were converted: instructions and integer arithmetic may keep another payload of a NaN.
template <class Stored>
bool same_or_nan(Stored a, Stored b) {
    if constexpr (std::is_same_v<Stored, float>)
        return std::isnan(a) ? std::isnan(b) : same_bits(a, b);
    else
        return std::isnan(widen(a)) ? std::isnan(widen(b)) : a.bits == b.bits;
}

template <class Stored>
const char* name_of() {
    if (std::is_same_v<Stored, double>) return "double";
    if (std::is_same_v<Stored, float>) return "float";
    return std::is_same_v<Stored, Half> ? "Half" : "BFloat16";
}

// Element i of an array: a number that every format holds.
template <class Stored>
Stored element(int i) {
    return narrow<Stored>(acc_t<Stored>(i + 1));
}

// Loads read the elements they are asked for and no others, stores write them and no others: the memory ends with the
// last one, and every element not to be written keeps its number.
template <class Stored>
void test_memory() {
    using A = acc_t<Stored>;
    using V = Vec<A>;
    const char* const name = name_of<Stored>();
    for (const int stride : {1, 2, 7}) {
        for (int n = 0; n <= V::size; ++n) {
            std::vector<Stored> from(n == 0 ? 0 : (n - 1) * stride + 1), to(from.size());
            for (std::size_t i = 0; i < from.size(); ++i)
                from[i] = element<Stored>(int(i)), to[i] = narrow<Stored>(A(0));
            const bool whole = n == V::size;
            if (!whole && stride != 1) continue;
            const V x =
                !whole ? load_n_or(from.data(), n, A(-5))
                       : (stride == 1 ? load_n_or(from.data(), Whole{}, A(-5)) : load_strided(from.data(), stride));
            for (int i = 0; i < V::size; ++i)
                check(x.v[i] == (i < n ? A(i * stride + 1) : A(-5)), "load of %d %s, stride %d: element %d is %g", n,
                      name, stride, i, double(x.v[i]));
            if (!whole)
                store_n(to.data(), x, n);
            else if (stride == 1)
                store_n(to.data(), x, Whole{});
            else
                store_strided(to.data(), stride, x);
            for (int i = 0; i < int(to.size()); ++i)
                check(widen(to[i]) == (i % stride == 0 ? widen(from[i]) : A(0)),
                      "store of %d %s, stride %d: element %d is %g", n, name, stride, i, double(widen(to[i])));
        }
    }
}

template <class Stored>
void test_for_vectors() {
    using A = acc_t<Stored>;
    for (int n = 0; n <= 3 * Vec<A>::size + 1; ++n) {
        std::vector<Stored> from(n), to(n);
        for (int i = 0; i < n; ++i) from[i] = element<Stored>(i);
        for_vectors<A>(n, [&](std::int64_t i, auto count) {
            store_n(to.data() + i, load_n_or(from.data() + i, count, A(0)) + Vec<A>(A(1)), count);
        });
        for (int i = 0; i < n; ++i)
            check(widen(to[i]) == A(i + 2), "for_vectors over %d %s: element %d", n, name_of<Stored>(), i);
    }
}

template <class A>
void test_operations() {
    using V = Vec<A>;
    const A nan = std::numeric_limits<A>::quiet_NaN(), inf = std::numeric_limits<A>::infinity();
    Random random(1);
    for (int repeat = 0; repeat < 200; ++repeat) {
        V a, b;
        A total = 0, top = -inf;
        for (int i = 0; i < V::size; ++i) {
            a.v[i] = A(random.below(41) - 20), b.v[i] = random.one_in(4) ? a.v[i] : A(random.below(41) - 20);
            total += a.v[i], top = std::max(top, a.v[i]);
        }
        check(a.sum() == total && a.max() == top && math::to_scalar(a) == a.v[0], "sum and max of a vector");
        const V larger = max(a, b), chosen = math::select((a < b) | (a == b), a, b);
        const V both = math::select((a <= b) & !(a >= b), V(A(1)), V(A(0)));
        V moved = a;
        moved += b;
        moved *= V(A(2));
        for (int i = 0; i < V::size; ++i) {
            const A x = a.v[i], y = b.v[i];
            check(larger.v[i] == std::max(x, y) && chosen.v[i] == std::min(x, y) && both.v[i] == A(x < y),
                  "comparisons of %g and %g", double(x), double(y));
            check(moved.v[i] == (x + y) * 2 && (a - b).v[i] == x - y && (-a).v[i] == -x && (a * b).v[i] == x * y &&
                      (a / V(A(4))).v[i] == x / 4,
                  "arithmetic on %g and %g", double(x), double(y));
        }
    }
    const V numbers = V::iota();
    for (int i = 0; i < V::size; ++i) check(numbers.v[i] == A(i), "iota");
    for (int i = 0; i < V::size; ++i) {
        V x = A(1), low = -inf;
        x.v[i] = nan, low.v[i] = A(3);
        check(std::isnan(x.sum()) && low.max() == A(3), "element %d of a reduction", i);
        check(max(V(A(1)), x).v[i] == A(1), "NaN is no maximum");
        check(!std::isnan(x.max()) || i == 0, "NaN is skipped behind a number");
    }
    check(same_bits(V(A(-0.0)).v[0], A(-0.0)) && V(inf).v[V::size - 1] == inf, "all elements of one number");
}

// Vectors of random neighbours, so that no element's conversion can depend on the others.
template <class Stored>
void test_widen() {
    constexpr int kCount = 0x10000;
    std::vector<Stored> stored(kCount);
    for (int i = 0; i < kCount; ++i) stored[i].bits = static_cast<std::uint16_t>(i);
    Random random(2);
    for (int i = kCount - 1; i > 0; --i) std::swap(stored[i], stored[random.below(i + 1)]);
    constexpr int kSize = Vec<float>::size;
    for (int i = 0; i < kCount; i += kSize) {
        const Vec<float> wide = load(stored.data() + i);
        Stored back[kSize];
        store(back, wide);
        for (int k = 0; k < kSize; ++k) {
            const Stored x = stored[i + k];
            check(same_or_nan(wide.v[k], widen(x)), "vector widen(%s 0x%04x)", name_of<Stored>(), unsigned(x.bits));
            check(same_or_nan(back[k], narrow<Stored>(widen(x))), "vector narrow(widen(%s 0x%04x)) = 0x%04x",
                  name_of<Stored>(), unsigned(x.bits), unsigned(back[k].bits));
        }
    }
}

// Floats through all bit patterns with a stride, and beside the points where the formats round.
template <class Stored>
void test_narrow(std::uint64_t stride) {
    constexpr int kSize = Vec<float>::size;
    Random random(3);
    for (std::uint64_t bits = 0; bits < (std::uint64_t(1) << 32);) {
        float x[kSize];
        for (int k = 0; k < kSize; ++k, bits += stride) {
            const auto pattern = static_cast<std::uint32_t>(bits);
            const std::uint32_t beside = std::is_same_v<Stored, Half> ? 0x1000u : 0x8000u;  // half an ulp
            x[k] = std::bit_cast<float>(k % 2 ? (pattern & ~(2 * beside - 1)) + beside + unsigned(random.below(3)) - 1
                                              : pattern);
        }
        Stored got[kSize];
        store(got, Vec<float>::load(x));
        for (int k = 0; k < kSize; ++k)
            check(same_or_nan(got[k], narrow<Stored>(x[k])), "vector narrow<%s>(%.9g) = 0x%04x, not 0x%04x",
                  name_of<Stored>(), double(x[k]), unsigned(got[k].bits), unsigned(narrow<Stored>(x[k]).bits));
    }
}

// Pairs keep their order between load and store; what they round is off by half of the last place at most.
template <class Stored>
void test_pairs() {
    constexpr int kSize = 2 * Vec<float>::size;
    using Limits = std::numeric_limits<float>;
    Random random(5);
    for (int repeat = 0; repeat < 2000; ++repeat) {
        Stored from[kSize], to[kSize];
        for (Stored& x : from) x.bits = static_cast<std::uint16_t>(random.below(0x10000));
        auto pair = Pair<Stored>::load(from);
        pair.store(to);
        for (int i = 0; i < kSize; ++i)
            check(same_or_nan(to[i], from[i]), "pair of %s 0x%04x", name_of<Stored>(), unsigned(from[i].bits));
        const auto scale = float(random.uniform(0.5, 1));
        pair.first *= Vec<float>(scale), pair.second *= Vec<float>(scale);
        pair.store(to);
        for (int i = 0; i < kSize; ++i) {
            const float exact = widen(from[i]) * scale;
            const Stored nearest = narrow<Stored>(exact);
            const bool as_near = std::fabs(widen(to[i]) - exact) <= std::fabs(widen(nearest) - exact);
            check(as_near || same_or_nan(to[i], nearest), "%g from a pair of %s, not %g", double(widen(to[i])),
                  name_of<Stored>(), double(exact));
        }
    }
    for (const float special : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::max(), -0.0f}) {
        Stored to[kSize];
        Pair<Stored>{Vec<float>(special), Vec<float>(special)}.store(to);
        for (const Stored x : to)
            check(same_or_nan(x, narrow<Stored>(special)), "%s of %g in a pair", name_of<Stored>(), double(special));
    }
}

template <class Stored>
void test_max_of() {
    Random random(6);
    for (int n = kShorts; n <= 3 * kShorts + 1; ++n)
        for (int repeat = 0; repeat < 50; ++repeat) {
            std::vector<Stored> x(n);
            float top = -std::numeric_limits<float>::infinity();
            for (Stored& each : x) {
                do each.bits = static_cast<std::uint16_t>(random.below(0x10000) | (repeat % 2 ? 0x8000 : 0));
                while (std::isnan(widen(each)));
                top = std::max(top, widen(each));
            }
            check(max_of(x.data(), n) == top, "largest of %d %s: %g, not %g", n, name_of<Stored>(),
                  double(max_of(x.data(), n)), double(top));
        }
}

template <class A>
void test_bits() {
    using V = Vec<A>;
    Random random(7);
    for (int repeat = 0; repeat < 1000; ++repeat) {
        V x;
        for (int i = 0; i < V::size; ++i) x.v[i] = random.one_in(2) ? A(0) : std::numeric_limits<A>::quiet_NaN();
        const VectorBits<A> bits = nonzero_bits(x);
        const V got = math::select(from_bits<A>(bits), V(A(1)), V(A(0)));
        for (int i = 0; i < V::size; ++i) {
            check((bits >> i & 1) == (x.v[i] != A(0)), "bit %d of 0x%04x", i, unsigned(bits));
            check(got.v[i] == A(x.v[i] != A(0)), "element %d of the bits 0x%04x", i, unsigned(bits));
        }
    }
}

// One vector of rows of every small width, close together and with gaps: all columns and each row's largest number
// arrive, and back in memory, as a function of number and column, no gap is touched. Only rows of fewer than four
// columns may be read and written up to the fourth.
void test_transposition() {
    constexpr int kSize = Vec<float>::size;
    for (int columns = 1; columns <= 33; ++columns) {
        for (const int stride : {columns, columns + 3}) {
            const int margin = columns < 4 ? 4 - columns : 0;
            std::vector<float> rows((kSize - 1) * stride + columns + margin, -1.0f), back(rows.size(), -2.0f);
            for (int r = 0; r < kSize; ++r)
                for (int c = 0; c < columns; ++c) rows[r * stride + c] = float(100 * r - (c - r) * (c - r));
            const auto plus_column = [](Vec<float> x, int c) { return x + Vec<float>(float(c)); };
            std::vector<float> transposed(columns * kSize);
            const Vec<float> top = rows_to_columns(rows.data(), stride, columns, transposed.data());
            columns_to_rows(transposed.data(), stride, columns, back.data(), plus_column);
            for (int r = 0; r < kSize; ++r) {
                const float* const row = rows.data() + r * stride;
                check(top.v[r] == *std::max_element(row, row + columns), "largest of %d columns, row %d", columns, r);
                for (int c = 0; c < columns; ++c)
                    check(transposed[c * kSize + r] == row[c] && back[r * stride + c] == row[c] + float(c),
                          "transposition of %d columns, stride %d: row %d, column %d", columns, stride, r, c);
                for (int c = std::max(columns, 4); c < stride && r + 1 < kSize; ++c)
                    check(back[r * stride + c] == -2.0f, "transposition of %d columns wrote into a gap", columns);
            }
        }
    }
}

// A store past the caches is a store.
template <class Stored>
void test_stream() {
    using V = Vec<acc_t<Stored>>;
    alignas(64) Stored to[2 * V::size];
    for (Stored& x : to) x = narrow<Stored>(acc_t<Stored>(-1));
    stream(to, V::iota());
    stream_fence();
    for (int i = 0; i < 2 * V::size; ++i)
        check(widen(to[i]) == (i < V::size ? acc_t<Stored>(i) : acc_t<Stored>(-1)), "stream of %s: element %d",
              name_of<Stored>(), i);
}

// With several accumulators every vector is visited once, in order, by one that exists.
void test_for_vectors_ahead() {
    using V = Vec<float>;
    for (int n = 0; n <= 9 * V::size + 1; ++n) {
        int next = 0;
        for_vectors_ahead<float, 4>(n, [&](std::int64_t i, auto count, auto k) {
            static_assert(decltype(k)::value >= 0 && decltype(k)::value < 4);
            check(i == next, "for_vectors_ahead over %d: %d instead of %d", n, int(i), next);
            if constexpr (std::is_same_v<decltype(count), Whole>)
                next += V::size;
            else
                next += count;
        });
        check(next == n, "for_vectors_ahead over %d ends at %d", n, next);
    }
}

template <class Stored>
void test_dtype() {
    test_memory<Stored>();
    test_for_vectors<Stored>();
    test_stream<Stored>();
}

}  // namespace

int main(int argc, char** argv) {
    const auto stride = static_cast<std::uint64_t>(argc > 1 ? std::max(1, std::atoi(argv[1])) : 257);
    test_dtype<double>();
    test_dtype<float>();
    test_dtype<Half>();
    test_dtype<BFloat16>();
    test_for_vectors_ahead();
    test_transposition();
    test_operations<float>();
    test_operations<double>();
    test_widen<Half>();
    test_widen<BFloat16>();
    test_narrow<Half>(stride);
    test_narrow<BFloat16>(stride);
    test_pairs<Half>();
    test_pairs<BFloat16>();
    test_max_of<Half>();
    test_max_of<BFloat16>();
    test_bits<float>();
    test_bits<double>();
    return fused_losses_test::report("vec.h");
}
