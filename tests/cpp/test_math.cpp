// core/math.h and core/pow.h, on scalars and on vectors, against the standard library in the next larger type: float
// through all bit patterns with a stride (first argument), double at random and special points.
#include "core/pow.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "check.h"
#include "cpu/vec.h"

namespace {

using namespace fused_losses;
using fused_losses_test::check;
using fused_losses_test::Random;

template <class T>
struct Wider;
template <>
struct Wider<float> {
    using type = double;
};
template <>
struct Wider<double> {
    using type = long double;
};
template <class T>
using wider_t = typename Wider<T>::type;

// Distance in units of the last place of the exact result. May be zero below the smallest normal number and infinite
// in the last half binade: math.h gives these up for exp and what is made of it.
template <class T>
double ulps(T got, wider_t<T> exact, bool of_exp) {
    using L = std::numeric_limits<T>;
    if (std::isnan(exact) || std::isnan(got)) return std::isnan(exact) && std::isnan(got) ? 0 : HUGE_VAL;
    if (of_exp && std::fabs(exact) < L::min() && got == T(0)) return 0;
    if (of_exp && exact > wider_t<T>(L::max()) * 0.70710681 && std::isinf(got)) return 0;
    if (std::isinf(exact)) return std::isinf(got) && std::signbit(got) == std::signbit(exact) ? 0 : HUGE_VAL;
    if (std::isinf(got)) return HUGE_VAL;
    const int exponent = exact == 0 ? L::min_exponent : std::max(std::ilogb(exact), L::min_exponent - 1);
    return static_cast<double>(std::fabs(got - exact) / std::ldexp(wider_t<T>(1), exponent - L::digits + 1));
}

struct Worst {
    double ulps = 0, at = 0;

    void see(double error, double x) {
        if (error > ulps) ulps = error, at = x;
    }
};

template <class T>
struct Function {
    const char* name;
    double bound;  // in ulp
    bool of_exp;
    void (*scalars)(const T* x, T* y, int n);
    void (*vectors)(const T* x, T* y, int n);
    wider_t<T> (*exact)(wider_t<T>);
};

constexpr int kBatch = 4096;  // whole vectors

// Loops, so that what is measured of scalars is the code the compiler vectorises.
#define FL_TEST_LOOPS(FUNCTION)                                                                                   \
    [](const T* x, T* y, int n) { _Pragma("omp simd") for (int i = 0; i < n; ++i) y[i] = math::FUNCTION(x[i]); }, \
        [](const T* x, T* y, int n) {                                                                             \
            for (int i = 0; i < n; i += Vec<T>::size) math::FUNCTION(Vec<T>::load(x + i)).store(y + i);           \
        },                                                                                                        \
        [](wider_t<T> x) { return std::FUNCTION(x); }

template <class T>
const std::vector<Function<T>>& functions() {
    static const std::vector<Function<T>> all = {
        {"exp", 2, true, FL_TEST_LOOPS(exp)},
        // exp(x) - 1 with x just above 0.34 is a quarter of exp(x): four times its error, and its own rounding.
        {"expm1", 5, true, FL_TEST_LOOPS(expm1)},
        {"log", 2, false, FL_TEST_LOOPS(log)},
        {"log1p", 2, false, FL_TEST_LOOPS(log1p)}};
    return all;
}

// Feeds batches of points to every function. `next` fills a batch and returns how many points it holds.
template <class T, class Next>
void compare(const char* type, Next next) {
    std::vector<T> x(kBatch), y(kBatch), of_vectors(kBatch);
    std::vector<Worst> worst(functions<T>().size());
    while (const int n = next(x.data(), kBatch)) {
        for (std::size_t f = 0; f < worst.size(); ++f) {
            const Function<T>& function = functions<T>()[f];
            function.scalars(x.data(), y.data(), n);
            function.vectors(x.data(), of_vectors.data(), n);
            for (int i = 0; i < n; ++i) {
                const wider_t<T> exact = function.exact(x[i]);
                worst[f].see(ulps<T>(y[i], exact, function.of_exp), x[i]);
                worst[f].see(ulps<T>(of_vectors[i], exact, function.of_exp), x[i]);
            }
        }
    }
    for (std::size_t f = 0; f < worst.size(); ++f) {
        std::printf("%s %s: %.3f ulp at %.9g\n", functions<T>()[f].name, type, worst[f].ulps, worst[f].at);
        check(worst[f].ulps < functions<T>()[f].bound, "%s(%s) is off by %.3f ulp at %.17g", functions<T>()[f].name,
              type, worst[f].ulps, worst[f].at);
    }
}

void test_float(std::uint64_t stride) {
    std::uint64_t bits = 0;
    compare<float>("float", [&](float* x, int size) {
        int n = 0;
        for (; n < size && bits < (std::uint64_t(1) << 32); bits += stride)
            x[n++] = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
        return n;
    });
}

// Random points over the whole range and where the functions change course.
template <class T>
T random_point(Random& random) {
    const double small = std::ldexp(random.uniform(-1, 1), -random.below(60));
    switch (random.below(8)) {
        case 0: return std::bit_cast<T>(static_cast<typename math::FloatFormat<T>::UInt>(random.bits()));
        case 1: return T(small);
        case 2: return T(1 + small);
        case 3: return T(-1 + small);
        case 4: return T(random.uniform(-1, 1));
        case 5: return T(random.uniform(0, 20));
        case 6: return T(random.uniform(-745, 710));
        default: return T(std::ldexp(random.uniform(1, 2), random.below(2000) - 1000));
    }
}

template <class T>
void test_random(const char* type, int points) {
    Random random(1);
    compare<T>(type, [&](T* x, int size) {
        const int n = std::min(size, points);
        points -= n;
        for (int i = 0; i < n; ++i) x[i] = random_point<T>(random);
        return n;
    });
}

template <class T>
void test_edges(const char* type) {
    using L = std::numeric_limits<T>;
    std::vector<T> edges = {T(0), L::denorm_min(), L::min(), L::epsilon(), L::max(), L::infinity(), T(1), T(2)};
    for (const double x : {0.34, 0.35, 0.5, 0.69314718055994531, 0.70710678118654752, 1.4142135623730951, 87.33, 87.34,
                           88.37, 88.38, 88.72, 708.39, 708.4, 709.43, 709.44, 709.78})
        edges.push_back(T(x));
    for (std::size_t i = 0, n = edges.size(); i < n; ++i) {
        edges.push_back(std::nextafter(edges[i], T(0)));
        edges.push_back(std::nextafter(edges[i], L::infinity()));
    }
    for (std::size_t i = 0, n = edges.size(); i < n; ++i) edges.push_back(-edges[i]);
    edges.push_back(L::quiet_NaN());
    bool done = false;
    compare<T>(type, [&](T* x, int) {
        if (done) return 0;
        done = true;
        std::copy(edges.begin(), edges.end(), x);
        return static_cast<int>(edges.size());
    });
    for (const T x : edges) {
        const T log = math::log(x), log_normal = math::log_normal(x);
        if (x >= L::min() || x != x) check(log == log_normal || log != log, "log_normal(%.17g) (%s)", double(x), type);
        if (x != x) check(log_normal != log_normal, "log_normal(NaN) (%s)", type);
    }
    check(math::exp(T(0)) == T(1) && math::log(T(1)) == T(0), "exp(0) and log(1) are exact (%s)", type);
    check(math::expm1(T(0)) == T(0) && math::log1p(T(-0.0)) == T(0), "expm1(0) and log1p(-0) are 0 (%s)", type);
    check(math::exp(-L::infinity()) == T(0) && math::expm1(-L::infinity()) == T(-1), "exp(-inf) (%s)", type);
}

// Off by what x loses in a single reduction.
void test_coarse_exp(int points) {
    Random random(3);
    Worst worst;
    for (int i = 0; i < points; ++i) {
        const float x = random.one_in(2) ? float(-random.uniform(0, 90)) : -std::fabs(random_point<float>(random));
        if (std::isnan(x)) continue;
        const double exact = std::exp(double(x)), bound = 3 + std::min(std::fabs(double(x)), 88.0);
        const Vec<float> y = math::coarse_exp_not_positive(Vec<float>(x));
        worst.see(std::max(ulps<float>(math::coarse_exp_not_positive(x), exact, true),
                           ulps<float>(y.v[i % Vec<float>::size], exact, true)) /
                      bound,
                  x);
    }
    std::printf("coarse exp: %.3f of its bound at %.9g\n", worst.ulps, worst.at);
    check(worst.ulps < 1, "coarse exp is off by %.3f times its bound at %.9g", worst.ulps, worst.at);
    check(math::coarse_exp_not_positive(0.0f) == 1 && math::coarse_exp_not_positive(-HUGE_VALF) == 0, "coarse edges");
    check(std::isnan(math::coarse_exp_not_positive(std::numeric_limits<float>::quiet_NaN())), "coarse exp of NaN");
}

template <class T>
void test_pow(const char* type, int points) {
    using L = std::numeric_limits<T>;
    const T inf = L::infinity();
    check(math::pow(T(0), T(0)) == T(1) && math::pow(inf, T(0)) == T(1), "pow(a, 0) = 1 (%s)", type);
    check(math::pow(T(0), T(0.5)) == T(0) && math::pow(T(0), T(-1)) == inf, "pow(0, b) (%s)", type);
    check(math::pow(inf, T(2)) == inf && math::pow(inf, T(-2)) == T(0), "pow(inf, b) (%s)", type);
    check(math::pow(T(1), T(7)) == T(1) && std::isnan(math::pow(L::quiet_NaN(), T(2))), "pow(1, b), pow(NaN, b) (%s)",
          type);
    // The elements of a vector are on their own.
    for (int k = 0; k < Vec<T>::size; ++k) {
        Vec<T> a = T(1), b = T(0);
        a.v[k] = T(0), b.v[k] = T(-1);
        const Vec<T> y = math::pow(a, b);
        for (int i = 0; i < Vec<T>::size; ++i)
            check(y.v[i] == (i == k ? inf : T(1)), "pow of a vector, element %d (%s)", i, type);
    }
    Random random(2);
    Worst worst;
    for (int i = 0; i < points; ++i) {
        const T a = std::fabs(random_point<T>(random));
        const T b = random.one_in(2) ? T(random.uniform(-4, 4)) : T(random.below(41) - 20) / 4;
        if (std::isnan(a) || std::isinf(a)) continue;
        const wider_t<T> exact = std::pow(wider_t<T>(a), wider_t<T>(b));
        const wider_t<T> exponent = a == 0 ? wider_t<T>(0) : std::fabs(b * std::log(wider_t<T>(a)));
        // log and product are off by 1.3 * 2^-digits of the exponent; an ulp is as small as half of 2^-digits.
        const double bound = 2 + 2.6 * static_cast<double>(exponent);
        const Vec<T> powers = math::pow(Vec<T>(a), Vec<T>(b));
        const double error =
            std::max(ulps<T>(math::pow(a, b), exact, true), ulps<T>(powers.v[i % Vec<T>::size], exact, true));
        worst.see(error / bound, a);
        check(error < bound, "pow(%.17g, %.17g) (%s) is off by %.3f ulp, bound %.3f", double(a), double(b), type, error,
              bound);
    }
    std::printf("pow %s: %.3f of its bound at a = %.9g\n", type, worst.ulps, worst.at);
}

// Estimates with a step of Newton's method on some instruction sets, and powers as products.
template <class T>
void test_products(const char* type, int points) {
    Random random(3);
    Worst inverse, root, power, coarse_power;
    for (int i = 0; i < points; ++i) {
        const T a = T(std::ldexp(random.uniform(1, 2), random.below(200) - 100));
        const int n = 1 + random.below(32);
        const T base = T(random.uniform(0.1, 1));
        const int lane = i % Vec<T>::size;
        inverse.see(ulps<T>(math::reciprocal(Vec<T>(a)).v[lane], 1 / wider_t<T>(a), false), a);
        root.see(ulps<T>(math::rsqrt(Vec<T>(a)).v[lane], 1 / std::sqrt(wider_t<T>(a)), false), a);
        root.see(ulps<T>(math::rsqrt(a), 1 / std::sqrt(wider_t<T>(a)), false), a);
        check(math::sqrt(Vec<T>(a)).v[lane] == std::sqrt(a), "sqrt(%.17g) (%s)", double(a), type);
        inverse.see(ulps<T>(math::reciprocal_or_zero(a), a > T(1e30) ? wider_t<T>(0) : 1 / wider_t<T>(a), false), a);
        const T y = T(random.uniform(-0.5, 0.5)), coarse = math::coarse_pow(a, y);
        const double bound = 4 + 4 * std::fabs(y) * (1 + std::fabs(std::log(a)));
        coarse_power.see(ulps<T>(coarse, std::pow(wider_t<T>(a), wider_t<T>(y)), true) / bound, a);
        const T powers = math::integer_power(Vec<T>(base), n).v[lane];
        power.see(ulps<T>(powers, std::pow(wider_t<T>(base), wider_t<T>(n)), false) / n, base);
    }
    std::printf("%s: 1/x %.3f ulp, 1/sqrt(x) %.3f ulp, x^n %.3f n ulp\n", type, inverse.ulps, root.ulps, power.ulps);
    check(inverse.ulps < 2 && root.ulps < 3 && power.ulps < 1 && coarse_power.ulps < 1, "1/x or a power of x of %s",
          type);
}

template <class T>
void test_unit_interval(const char* type, int points) {
    Random random(4);
    Worst log;
    for (int i = 0; i < points; ++i) {
        const T x = T(random.one_in(2) ? random.uniform(0, 1) : std::ldexp(random.uniform(0, 1), -random.below(60)));
        const wider_t<T> exact = x == T(0) ? wider_t<T>(1) : std::log1p(wider_t<T>(x)) / wider_t<T>(x);
        const T of_vector = math::log1p_over(Vec<T>(x)).v[i % Vec<T>::size];
        log.see(std::max(ulps<T>(math::log1p_over(x), exact, false), ulps<T>(of_vector, exact, false)), x);
        check(math::minus_abs(x) == -x && math::minus_abs(Vec<T>(-x)).v[0] == -x, "-|x| of %s", type);
    }
    std::printf("%s: log(1 + x) / x %.3f ulp at %.9g\n", type, log.ulps, log.at);
    check(log.ulps < 3 && math::log1p_over(T(0)) == T(1), "log(1 + x) / x of %s: %.3f ulp", type, log.ulps);
    const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
    check(std::isnan(math::log1p_over(nan)) && std::isnan(math::minus_abs(nan)) && math::minus_abs(inf) == -inf,
          "NaN and infinity of %s", type);
}

}  // namespace

int main(int argc, char** argv) {
    const int stride = argc > 1 ? std::max(1, std::atoi(argv[1])) : 257;
    const int points = 200000000 / stride;
    test_edges<float>("float");
    test_edges<double>("double");
    test_float(static_cast<std::uint64_t>(stride));
    test_random<float>("float", points);
    test_random<double>("double", points);
    test_coarse_exp(points);
    test_pow<float>("float", points);
    test_pow<double>("double", points);
    test_unit_interval<float>("float", points / 4);
    test_unit_interval<double>("double", points / 4);
    test_products<float>("float", points / 4);
    test_products<double>("double", points / 4);
    return fused_losses_test::report("math.h");
}
