// exp, log and tanh on vectors, to about 1 ulp: what softmax, soft caps, sampling and an engine's activations need.
// Polynomials and argument reductions after Cephes (expf.c, logf.c, tanhf.c, S. Moshier). exp and tanh keep NaN.
#pragma once

#include <limits>

#include "vec.h"

namespace ingot {

inline vf to_vector(vi x) { return __builtin_convertvector(x, vf); }
inline vi as_int(vf x) { return (vi)x; }
inline vf as_float(vi x) { return (vf)x; }

// Nearest integer of |x| < 2^22, as a float: adding 1.5 * 2^23 rounds in the hardware's way.
inline vf nearest(vf x) {
  const vf magic = splat(12582912.0f);
  return (x + magic) - magic;
}

inline vf vexp(vf x) {
  const float infinity = std::numeric_limits<float>::infinity();
  const vf low = splat(-104.0f), high = splat(88.72284f);
  const vf inside = x < low ? low : (x > high ? high : x);
  const vf n = nearest(inside * 1.44269504088896341f);
  vf r = fma(n, splat(-0.693359375f), inside);
  r = fma(n, splat(2.12194440e-4f), r);
  vf y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r) + 1.0f;
  // 2^n in two factors: one exponent field alone cannot hold what subnormal results need.
  const vi whole = __builtin_convertvector(n == n ? n : zero(), vi);
  const vi half = whole >> 1;
  y = y * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
  return x > high ? splat(infinity) : (x < low ? zero() : y);
}

// Natural logarithm of positive normal numbers; 0 gives -infinity.
inline vf vlog(vf x) {
  const vi bits = as_int(x);
  vf mantissa = as_float((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  vf exponent = to_vector((bits >> 23) - 126);
  const vi small = mantissa < 0.707106781186547524f;
  exponent = small ? exponent - 1.0f : exponent;
  mantissa = (small ? mantissa + mantissa : mantissa) - 1.0f;
  const vf square = mantissa * mantissa;
  vf y = splat(7.0376836292e-2f);
  y = fma(y, mantissa, splat(-1.1514610310e-1f));
  y = fma(y, mantissa, splat(1.1676998740e-1f));
  y = fma(y, mantissa, splat(-1.2420140846e-1f));
  y = fma(y, mantissa, splat(1.4249322787e-1f));
  y = fma(y, mantissa, splat(-1.6668057665e-1f));
  y = fma(y, mantissa, splat(2.0000714765e-1f));
  y = fma(y, mantissa, splat(-2.4999993993e-1f));
  y = fma(y, mantissa, splat(3.3333331174e-1f));
  y = y * mantissa * square;
  y = fma(exponent, splat(-2.12194440e-4f), y);
  y = fma(square, splat(-0.5f), y);
  y = fma(exponent, splat(0.693359375f), mantissa + y);
  return x == 0.0f ? splat(-std::numeric_limits<float>::infinity()) : y;
}

inline vf vtanh(vf x) {
  const vf size = as_float(as_int(x) & 0x7fffffff);
  const vf square = x * x;
  vf y = splat(-5.70498872745e-3f);
  y = fma(y, square, splat(2.06390887954e-2f));
  y = fma(y, square, splat(-5.37397155531e-2f));
  y = fma(y, square, splat(1.33314422036e-1f));
  y = fma(y, square, splat(-3.33332819422e-1f));
  const vf near = fma(y * square, x, x);
  const vf far = 1.0f - 2.0f / (vexp(size + size) + 1.0f);
  const vf signed_far = as_float(as_int(far) | (as_int(x) & int32_t(0x80000000)));
  return size < 0.625f ? near : signed_far;
}

}  // namespace ingot
