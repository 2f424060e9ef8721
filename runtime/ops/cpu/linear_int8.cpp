// Products with int8 weights that have more than one scale in a row; one scale per row is linear.cpp's.
#include "linear_rows.h"

namespace ingot {

void multiply_int8(const Product& p, const QuantizedWeight& w) {
  const auto value = [](const char* data, int64_t column) { return float(int8_t(data[column])); };
  multiply_rows(p, [&](int64_t row, float* out) { dequantize_row(w, row, p.k, p.k, 0, value, out); });
}

}  // namespace ingot
