// Powers, as core/math.h has the other elementary functions.
#pragma once

#include "core/math.h"

namespace fused_losses {
inline namespace FL_ISA {
namespace math {

// e^x and e^x - 1 of what exp_not_positive() takes.
template <class T>
struct Exponentials {
    T value, minus_1;

    FL_HD explicit Exponentials(T x) : value(exp_not_positive(x)), minus_1(expm1_of(x, value)) {}
};

// a^n. Max Error: n ulp. Valid Range: n >= 1, the same for all elements; no overflow or underflow on the way.
template <class T>
FL_HD T integer_power(T a, int n) {
    while (n % 2 == 0) a *= a, n /= 2;
    T product = a;
    while (n /= 2) {
        a *= a;
        if (n % 2) product *= a;
    }
    return product;
}

// x^y where some ulp do not matter. Max Error: 4 + 4 |y| (1 + |log x|) ulp. Valid Range: normal x > 0, NaN.
template <class T>
FL_HD T coarse_pow(T x, T y) {
#ifdef FL_ON_DEVICE
    if constexpr (sizeof(T) == 4) return exp2_approximately(y * log2_approximately(x));
#endif
    return exp(y * log(x));
}

// pow(0, 0) = 1. Max Error: 2 + 2.6 |b log a| ulp. Valid Range: a >= 0, NaN.
template <class T>
FL_HD T pow(T a, T b) {
    using S = scalar_t<T>;
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 8) return ::pow(a, b);
#endif
    return select(b == T(S(0)), T(S(1)), exp(b * log(a)));
}

}  // namespace math
}  // namespace FL_ISA
}  // namespace fused_losses
