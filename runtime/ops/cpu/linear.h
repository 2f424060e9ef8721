// What every product with a stored weight shares: the operands as plain pointers, and how sums become results.
// linear.cpp reads and finishes them; each weight format multiplies in a file of its own (linear_*.cpp).
#pragma once

#include <cstdint>

#include "tensor.h"

namespace ingot {

struct Product {
  const float* x = nullptr;  // [m, k], contiguous, once read_rows has been called
  int64_t m = 0, n = 0, k = 0;
  const float* row_scale = nullptr;  // [m] or null: of quantized activations
  const float* scale = nullptr;      // [n] or null
  const float* bias = nullptr;       // [n] or null
  void* out = nullptr;               // [m, n] in out_type
  int32_t out_type = kFloat32;
};

// Values with a scale, and perhaps a zero point, for each block of `rows` x `columns`; blocks lie row by row.
struct QuantizedWeight {
  const char* values = nullptr;
  const char* scale = nullptr;
  int32_t scale_type = kFloat32;  // float32, bfloat16 or float16; uint8 for exponents (e8m0)
  const uint8_t* zero = nullptr;  // or null
  int64_t rows = 1, columns = 0;
  int64_t blocks = 1;  // in a row of the weight
};

// Sizes, bias and a new result [..., n], checked; `columns` is the weight's k. x is not read.
Product open_product(const View& x, int64_t n, int64_t columns, AtenTensorHandle* bias, AtenTensorHandle* ret);

// Where row `row` of x [..., k] begins, in elements.
inline int64_t row_offset(const View& x, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = x.dim - 2; d >= 0; --d) {
    offset += row % x.sizes[d] * x.strides[d];
    row /= x.sizes[d];
  }
  return offset;
}

// Row `row` of x as float32 [k].
void widen_row(const View& x, int64_t row, float* out);

// p.x: x as float32 rows, itself where it is that already.
void read_rows(const View& x, Product& p);

// Scales, bias and rounding to the output's type, for a rectangle of sums [m1 - m0, n1 - n0] whose rows are `ld` apart.
void finish(const Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, int64_t ld);

// One scale per weight row, in p.scale.
void multiply_int8_channels(const Product& p, const int8_t* w);

void multiply_int8(const Product& p, const QuantizedWeight& w);
void multiply_int4(const Product& p, const QuantizedWeight& w);
void multiply_fp8(const Product& p, const QuantizedWeight& w);
void multiply_mxfp4(const Product& p, const QuantizedWeight& w);

}  // namespace ingot
