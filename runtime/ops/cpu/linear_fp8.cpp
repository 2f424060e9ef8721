// Products with fp8 weights (e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity), scaled by row or by block.
#include <array>
#include <cmath>

#include "linear_rows.h"

namespace ingot {
namespace {

float e4m3(int bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return bits & 128 ? -size : size;
}

const std::array<float, 256>& table() {
  static const std::array<float, 256> made = [] {
    std::array<float, 256> out;
    for (int bits = 0; bits < 256; ++bits) out[bits] = e4m3(bits);
    return out;
  }();
  return made;
}

}  // namespace

void multiply_fp8(const Product& p, const QuantizedWeight& w) {
  const float* values = table().data();
  const auto value = [values](const char* data, int64_t column) { return values[uint8_t(data[column])]; };
  multiply_rows(p, [&](int64_t row, float* out) { dequantize_row(w, row, p.k, p.k, 0, value, out); });
}

}  // namespace ingot
