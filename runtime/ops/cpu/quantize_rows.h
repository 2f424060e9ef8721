// Activations quantized on the fly: every row by its own scale, to whole numbers of int8 or floats of e4m3fn.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace ingot {

// The nearest float of e4m3fn, ties to even; |x| is at most 448.
inline float round_e4m3(float x) {
  int exponent;
  std::frexp(x, &exponent);  // |x| = f * 2^exponent with f in [0.5, 1)
  const int step = std::max(exponent - 4, -9);
  return std::isfinite(x) ? std::ldexp(std::nearbyint(std::ldexp(x, -step)), step) : x;
}

// Values of `x` [k] into `out`; returns the scale, largest magnitude / 127 or / 448, 1 for a row of zeros. A row that
// holds NaN or an infinity becomes NaN.
inline float quantize_row(const float* x, int64_t k, bool fp8, float* out) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < k; ++i) {
    const float size = std::fabs(x[i]);
    finite &= std::isfinite(size);
    largest = size > largest ? size : largest;
  }
  const float scale = largest == 0 ? 1.0f : largest / (fp8 ? 448.0f : 127.0f);
  for (int64_t i = 0; i < k; ++i) {
    const float scaled = x[i] / scale;
    out[i] = fp8 ? round_e4m3(std::min(448.0f, std::max(-448.0f, scaled))) : std::nearbyint(scaled);
  }
  return finite ? scale : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace ingot
