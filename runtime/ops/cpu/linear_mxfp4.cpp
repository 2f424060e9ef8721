// Products with mxfp4 weights: nibbles of e2m1, two columns a byte, and a power of two for each block of columns.
#include "linear_rows.h"

namespace ingot {

void multiply_mxfp4(const Product& p, const QuantizedWeight& w) {
  static const float values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  const auto value = [](const char* data, int64_t column) {
    return values[uint8_t(data[column / 2]) >> column % 2 * 4 & 15];
  };
  multiply_rows(p, [&](int64_t row, float* out) { dequantize_row(w, row, p.k, p.k / 2, 0, value, out); });
}

}  // namespace ingot
