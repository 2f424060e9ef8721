// x as rows of cells, block of k by block of k: what a tile reads of its rows lies together, in whatever dtype and with
// whatever strides x came.
#pragma once

#include <limits>
#include <type_traits>

#include "linear.h"
#include "packed.h"
#include "parallel.h"

namespace ingot {

// Symmetric int8 of a row, as whole floats from -127 to 127 in place; returns the scale (see quantize_rows.h).
inline float quantize_whole(float* row, int64_t k) {
  vf largest = zero();
  vi special = {};
  const vi exponent = splat_int(0x7f800000), magnitude = splat_int(0x7fffffff);
  const auto look = [&](vf x) {
    largest = vmax(vf(vi(x) & magnitude), largest);
    special |= (vi(x) & exponent) == exponent;
  };
  int64_t i = 0;
  for (; i + W <= k; i += W) look(load(row + i));
  if (i < k) look(load_part(row + i, k - i));
  float most = 0;
  for (int lane = 0; lane < W; ++lane) most = std::max(most, largest[lane]);
  if (any(special)) {
    std::fill(row, row + k, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = most == 0 ? 1.0f : most / 127.0f;
  for (int64_t j = 0; j < k; ++j) row[j] = __builtin_nearbyintf(row[j] / scale);
  return scale;
}

// Rows of x as cells of A. Of Int8Cells there is one row more: 128 everywhere, for what was added to the others.
template <class A>
struct Rows {
  static constexpr int64_t stride = kBlock / A::kSteps;  // cells from row to row
  const Cell* cells;
  int64_t rows;

  // Cells of row `row` from k on.
  const Cell* at(int64_t row, int64_t k) const {
    return cells + (k / kBlock * rows + row) * stride + k % kBlock / A::kSteps;
  }

  // Reads x into scratch memory; `k` is p.k filled up with zeros. Quantizing also sets p.row_scale.
  Rows(const View& x, Product& p, int64_t k, bool quantize) : rows(p.m + kExtra) {
    struct CellsTag {};
    struct ScalesTag {};
    const int64_t blocks = (k + kBlock - 1) / kBlock;
    Cell* to = reinterpret_cast<Cell*>(scratch<CellsTag>(blocks * rows * stride));
    float* scales = quantize ? scratch<ScalesTag>(p.m) : nullptr;
    cells = to;
    p.row_scale = scales;
    parallel_for(rows, rows * k * 4, [&](int64_t row) { read_row(x, p, row, k, to, scales); });
  }

 private:
#if defined(__AVX512VNNI__)
  static constexpr int64_t kExtra = std::is_same_v<A, Int8Cells>;
#else
  static constexpr int64_t kExtra = 0;
#endif

  void read_row(const View& x, const Product& p, int64_t row, int64_t k, Cell* to, float* scales) const {
    struct WideTag {};
    const auto place = [&](int64_t at) { return to + (at / kBlock * rows + row) * stride; };
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<A, BFloat16Cells>) {
      const bfloat16* from = x.as<bfloat16>() + row_offset(x, row);
      const int64_t step = x.strides[x.dim - 1];
      for (int64_t block = 0; block < k; block += kBlock) {
        bfloat16* cell = reinterpret_cast<bfloat16*>(place(block));
        const int64_t count = std::min(kBlock, p.k - block), filled = std::min(kBlock, k - block);
        if (step == 1) std::copy(from + block, from + block + count, cell);
        else for (int64_t i = 0; i < count; ++i) cell[i] = from[(block + i) * step];
        std::fill(cell + count, cell + filled, bfloat16{0});
      }
      return;
    }
#endif
    float* wide = scratch<WideTag>(k);
    std::fill(wide + p.k, wide + k, 0.0f);
    if (row < p.m) widen_row(x, row, wide);
    else std::fill(wide, wide + p.k, 0.0f);
    if (scales && row < p.m) scales[row] = quantize_whole(wide, p.k);
    for (int64_t block = 0; block < k; block += kBlock) {
      const int64_t count = std::min(kBlock, k - block);
#if defined(__AVX512VNNI__)
      if constexpr (std::is_same_v<A, Int8Cells>) {
        uint8_t* cell = reinterpret_cast<uint8_t*>(place(block));
        for (int64_t i = 0; i < count; ++i) cell[i] = uint8_t(int32_t(wide[block + i]) + 128);
        continue;
      }
#endif
      std::memcpy(place(block), wide + block, count * sizeof(float));
    }
  }
};

}  // namespace ingot
