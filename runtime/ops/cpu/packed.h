// Products with weights in panels: 64 rows of the weight side by side, so that a step of k is one run of memory, no sum
// is ever folded across lanes, and a panel is read from its first byte to its last.
//
// A panel is a sequence of 32-bit words, [k / per_word][64]: two bfloat16, four int8 or eight int4 values of one weight
// row each. A tile multiplies *cells*, 32 bits as well: one float32, two bfloat16 where the target multiplies those
// (AVX512_BF16), or four int8 (AVX512_VNNI). How words become cells is in packed_formats.h.
//
// What is promised about rounding: k is cut at multiples of kBlock and of the group, whatever the number of input rows;
// each piece is summed in order, one lane per weight row, and the pieces are added in order. So a row's result does not
// depend on the rows beside it, on the tile it fell into, or on the number of threads.
#pragma once

#include "vec.h"

namespace ingot {

constexpr int64_t kPanel = 64;   // weight rows per panel
constexpr int64_t kUnit = 8;     // k is filled up with zeros to a multiple of this
constexpr int64_t kBlock = 256;  // k of a panel that is summed before it is added to what came before

typedef int32_t Cell;

inline vi load_cells(const Cell* p) {
  vi out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline void store_cells(Cell* p, vi x) { std::memcpy(p, &x, sizeof x); }

// Adds a tile's sums to `to`, with a scale for each column if there is one.
inline void add_sums(vf sum, const float* scale, Cell* to) {
  const vf before = vf(load_cells(to));
  store_cells(to, vi(scale ? fma(sum, load(scale), before) : sum + before));
}
inline void add_sums(vi sum, const float*, Cell* to) { store_cells(to, load_cells(to) + sum); }

// One float32 a cell: any target, any dtype of x.
struct FloatCells {
  static constexpr int kSteps = 1;  // k per cell
  using Sum = vf;
  static Sum dot(Sum sum, vi x, vi w) { return fma(vf(x), vf(w), sum); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 a cell. The products are exact, the sums float32; denormals count as zero.
struct BFloat16Cells {
  static constexpr int kSteps = 2;
  using Sum = vf;
  static Sum dot(Sum sum, vi x, vi w) { return vf(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(w))); }
};
#endif

#if defined(__AVX512VNNI__)
// Four int8 a cell, x without its sign (128 is added to it): whole sums, exact up to k = 65,536.
struct Int8Cells {
  static constexpr int kSteps = 4;
  using Sum = vi;
  static Sum dot(Sum sum, vi x, vi w) { return vi(_mm512_dpbusd_epi32(__m512i(sum), __m512i(x), __m512i(w))); }
};
#endif

constexpr int kTileRows = 6;
constexpr int kTileVectors = W == 8 ? 2 : 4;  // 12 or 24 sums, as many as the registers hold beside a step's operands

// sums[m][column] += scale[column] * (x[m] . panel[column]) over `count` cells; without a scale it is 1. Rows of x lie
// `ldx` cells apart, those of `sums` kPanel.
template <class A, int MR>
inline void tile(const Cell* x, int64_t ldx, const Cell* panel, int64_t count, Cell* sums, const float* scale) {
  constexpr int NV = kTileVectors;
  for (int64_t column = 0; column < kPanel; column += NV * W) {
    typename A::Sum acc[MR][NV] = {};
    const Cell* w = panel + column;
    for (int64_t i = 0; i < count; ++i, w += kPanel) {
      vi cells[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) cells[v] = load_cells(w + v * W);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const vi row = splat_int(x[m * ldx + i]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = A::dot(acc[m][v], row, cells[v]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = column + v * W;
        add_sums(acc[m][v], scale ? scale + at : nullptr, sums + m * kPanel + at);
      }
  }
}

template <class A>
inline void tile_rows(const Cell* x, int64_t ldx, int64_t rows, const Cell* panel, int64_t count, Cell* sums,
                      const float* scale) {
  for (; rows >= kTileRows; rows -= kTileRows, x += kTileRows * ldx, sums += kTileRows * kPanel) {
    tile<A, kTileRows>(x, ldx, panel, count, sums, scale);
  }
  switch (rows) {
    case 1: return tile<A, 1>(x, ldx, panel, count, sums, scale);
    case 2: return tile<A, 2>(x, ldx, panel, count, sums, scale);
    case 3: return tile<A, 3>(x, ldx, panel, count, sums, scale);
    case 4: return tile<A, 4>(x, ldx, panel, count, sums, scale);
    case 5: return tile<A, 5>(x, ldx, panel, count, sums, scale);
  }
}

}  // namespace ingot
