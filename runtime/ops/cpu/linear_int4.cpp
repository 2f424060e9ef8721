// Products with int4 weights: two columns a byte, the even one in the low nibble, values 0 to 15, zero point 8 if none.
#include "linear_rows.h"

namespace ingot {

void multiply_int4(const Product& p, const QuantizedWeight& w) {
  const auto value = [](const char* data, int64_t column) {
    return float(uint8_t(data[column / 2]) >> column % 2 * 4 & 15);
  };
  multiply_rows(p, [&](int64_t row, float* out) { dequantize_row(w, row, p.k, p.k / 2, 8, value, out); });
}

}  // namespace ingot
