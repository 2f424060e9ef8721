// The vector functions of SLEEF that Inductor's CPU code calls by name (libtorch_cpu.so exports them; without torch we
// do). exp and tanh, which activations run over every element, are vectorized; the rest goes lane by lane through libm,
// which is as exact and not on any hot path of a decoder.
#include <cmath>

#include "tensor.h"
#include "vmath.h"

namespace {

template <float (*function)(float)>
ingot::vf lanes(ingot::vf x) {
  for (int i = 0; i < ingot::W; ++i) x[i] = function(x[i]);
  return x;
}

template <float (*function)(float, float)>
ingot::vf lanes(ingot::vf x, ingot::vf y) {
  for (int i = 0; i < ingot::W; ++i) x[i] = function(x[i], y[i]);
  return x;
}

}  // namespace

#define JOIN_(name, width, suffix) Sleef_##name##f##width##suffix
#define JOIN(name, width, suffix) JOIN_(name, width, suffix)
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define ONE(name, suffix, function) \
  extern "C" INGOT_API ingot::vf JOIN(name, WIDTH, suffix)(ingot::vf x) { return function(x); }
#define TWO(name, suffix, function) \
  extern "C" INGOT_API ingot::vf JOIN(name, WIDTH, suffix)(ingot::vf x, ingot::vf y) { return function(x, y); }

ONE(exp, _u10, ingot::vexp)
ONE(tanh, _u10, ingot::vtanh)
ONE(exp2, _u10, lanes<exp2f>)
ONE(expm1, _u10, lanes<expm1f>)
ONE(log, _u10, lanes<logf>)
ONE(log2, _u10, lanes<log2f>)
ONE(log10, _u10, lanes<log10f>)
ONE(log1p, _u10, lanes<log1pf>)
ONE(sin, _u10, lanes<sinf>)
ONE(sin, _u35, lanes<sinf>)
ONE(cos, _u10, lanes<cosf>)
ONE(cos, _u35, lanes<cosf>)
ONE(tan, _u10, lanes<tanf>)
ONE(asin, _u10, lanes<asinf>)
ONE(acos, _u10, lanes<acosf>)
ONE(atan, _u10, lanes<atanf>)
ONE(sinh, _u10, lanes<sinhf>)
ONE(cosh, _u10, lanes<coshf>)
ONE(erf, _u10, lanes<erff>)
ONE(erfc, _u15, lanes<erfcf>)
TWO(pow, _u10, lanes<powf>)
TWO(atan2, _u10, lanes<atan2f>)
TWO(hypot, _u05, lanes<hypotf>)
TWO(fmod, , lanes<fmodf>)
TWO(copysign, , lanes<copysignf>)
