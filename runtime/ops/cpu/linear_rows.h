// Products with weights that are made float32 row by row and then multiplied with all rows of x. Right for every
// format and any block of scales; the same tile in the same order as in linear.cpp, so a row of x gives the same bits
// in every batch.
#pragma once

#include "linear.h"
#include "parallel.h"
#include "vec.h"

namespace ingot {

// The scale of block `index`.
inline float scale_at(const QuantizedWeight& w, int64_t index) {
  switch (w.scale_type) {
    case kFloat32: return reinterpret_cast<const float*>(w.scale)[index];
    case kBFloat16: return to_float(reinterpret_cast<const bfloat16*>(w.scale)[index]);
    case kFloat16: return to_float(reinterpret_cast<const float16*>(w.scale)[index]);
    default: {
      const uint32_t exponent = uint8_t(w.scale[index]);
      const uint32_t bits = exponent == 255 ? 0x7fc00000u : exponent == 0 ? 1u << 22 : exponent << 23;
      float out;
      std::memcpy(&out, &bits, 4);
      return out;
    }
  }
}

// Row `row` as float32 [k]: value(byte offset of the row's start, column) without zero point and scale, then both.
template <class Value>
inline void dequantize_row(const QuantizedWeight& w, int64_t row, int64_t k, int64_t row_bytes, float no_zero,
                           const Value& value, float* out) {
  const char* data = w.values + row * row_bytes;
  const int64_t first = row / w.rows * w.blocks;
  for (int64_t block = 0; block < w.blocks; ++block) {
    const float scale = scale_at(w, first + block), zero = w.zero ? float(w.zero[first + block]) : no_zero;
    const int64_t end = std::min(k, (block + 1) * w.columns);
    for (int64_t column = block * w.columns; column < end; ++column) out[column] = (value(data, column) - zero) * scale;
  }
}

// `row(n, out)` writes weight row n as float32 [k].
template <class Row>
inline void multiply_rows(const Product& p, const Row& row) {
  struct WideTag {};
  struct SumsTag {};
  constexpr int64_t together = 4, most = 64;  // weight rows per tile; rows of x whose sums are held
  parallel_for((p.n + together - 1) / together, p.n * p.k * p.m, [&](int64_t task) {
    const int64_t n0 = task * together, count = std::min(together, p.n - n0);
    float *wide = scratch<WideTag>(together * p.k), *sums = scratch<SumsTag>(together * most);
    for (int64_t n = 0; n < count; ++n) row(n0 + n, wide + n * p.k);
    for (int64_t m0 = 0; m0 < p.m; m0 += most) {
      const int64_t rows = std::min(most, p.m - m0);
      std::fill(sums, sums + rows * count, 0.0f);
      for (int64_t k = 0; k < p.k; k += kBlockK) {
        const int64_t block = std::min(kBlockK, p.k - k);
        const float *x = p.x + m0 * p.k + k, *w[together];
        for (int64_t n = 0; n < count; ++n) w[n] = wide + n * p.k + k;
        if (count == together) rows_times<together>(x, p.k, rows, w, block, sums, count);
        else for (int64_t n = 0; n < count; ++n) rows_times<1>(x, p.k, rows, w + n, block, sums + n, count);
      }
      finish(p, m0, m0 + rows, n0, n0 + count, sums, count);
    }
  });
}

}  // namespace ingot
