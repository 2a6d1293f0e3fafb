// The arithmetic of the naive formulas: long double, or with FL_QUAD what has 113 bits everywhere.
#pragma once

#include <cfloat>
#include <cmath>

#if defined(FL_QUAD) && LDBL_MANT_DIG < 113
#include <quadmath.h>
#endif

namespace fused_losses_test {

#if defined(FL_QUAD) && LDBL_MANT_DIG < 113
using Real = __float128;

inline Real exp(Real x) { return expq(x); }
inline Real expm1(Real x) { return expm1q(x); }
inline Real log(Real x) { return logq(x); }
inline Real log1p(Real x) { return log1pq(x); }
inline Real pow(Real x, Real y) { return powq(x, y); }
inline Real fabs(Real x) { return fabsq(x); }
inline Real fmax(Real x, Real y) { return fmaxq(x, y); }
inline Real fmin(Real x, Real y) { return fminq(x, y); }
#else
using Real = long double;

using std::exp, std::expm1, std::log, std::log1p, std::pow, std::fabs, std::fmax, std::fmin;
#endif

}  // namespace fused_losses_test
