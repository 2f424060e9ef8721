// What the 32-bit words of a panel hold, and how they become the cells of a tile. Exact in every case: int8 and int4
// with their zero points are whole numbers that bfloat16 holds, and scales are applied to the sums.
#pragma once

#include "packed.h"

namespace ingot {

typedef uint8_t vb __attribute__((vector_size(W)));

constexpr int64_t kAhead = 1024;  // words that are asked for ahead of their use: one page

inline vi float_cell(vi whole) { return vi(__builtin_convertvector(whole, vf)); }

// k, k + 1 from the low to the high half.
struct BFloat16Words {
  static constexpr int kPerWord = 2;
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 1;  // what the cells' sums are to be multiplied with
  static void expand(vi words, vi, vi (&cells)[2], FloatCells) {
    cells[0] = words << 16;
    cells[1] = words & splat_int(int32_t(0xffff0000));
  }
#if defined(__AVX512BF16__)
  static void expand(vi words, vi, vi (&cells)[1], BFloat16Cells) { cells[0] = words; }
#endif
};

// k to k + 3 from the lowest to the highest byte. A byte is converted where the highest one is: times 2^24.
struct Int8Words {
  static constexpr int kPerWord = 4;
  static constexpr bool kZeros = false;
  static constexpr float kFactor = 0x1p-24f;
  static void expand(vi words, vi, vi (&cells)[4], FloatCells) {
    const vi top = splat_int(int32_t(0xff000000));
    cells[0] = float_cell(words << 24);
    cells[1] = float_cell(words << 16 & top);
    cells[2] = float_cell(words << 8 & top);
    cells[3] = float_cell(words & top);
  }
#if defined(__AVX512BF16__)
  static void expand(vi words, vi, vi (&cells)[2], BFloat16Cells) {
    vi wide[4];
    expand(words, words, wide, FloatCells{});
    // Eight bits of a whole number fill no more than the upper half of its float32.
    for (int i = 0; i < 2; ++i) cells[i] = vi(vu(wide[2 * i]) >> 16) | wide[2 * i + 1];
  }
#endif
#if defined(__AVX512VNNI__)
  static void expand(vi words, vi, vi (&cells)[1], Int8Cells) { cells[0] = words; }
#endif
};

#if defined(__AVX512BF16__)
// The 32 whole numbers from `first`, or twice the 16 from there, as bfloat16.
struct alignas(64) Numbers {
  uint16_t bits[32];
  constexpr Numbers(int first, bool twice) : bits() {
    for (int i = 0; i < 32; ++i) {
      const int value = first + (twice ? i % 16 : i), size = value < 0 ? -value : value;
      int log = 0;
      while (size >> (log + 1)) ++log;
      const int magnitude = size == 0 ? 0 : (127 + log) << 7 | (size << (7 - log) & 127);
      bits[i] = uint16_t((value < 0 ? 0x8000 : 0) | magnitude);
    }
  }
};
constexpr Numbers kSigned16{-8, true}, kSigned32{-16, false};
#endif

// k, k + 2, k + 4, k + 6 in the low half, k + 1, k + 3, … in the high half, from the lowest nibble up. Zero points come
// once in each half; without them it is 8.
template <bool Zeros>
struct Int4Words {
  static constexpr int kPerWord = 8;
  static constexpr bool kZeros = Zeros;
  static constexpr float kFactor = 1;
  static void expand(vi words, vi zeros, vi (&cells)[8], FloatCells) {
    const vi mask = splat_int(15), middle = Zeros ? zeros & mask : splat_int(8);
    for (int i = 0; i < 8; ++i) cells[i] = float_cell((words >> (i % 2 * 16 + i / 2 * 4) & mask) - middle);
  }
#if defined(__AVX512BF16__)
  // Looked up by the lowest five bits of each half: value + 16 - zero point, or, with the table doubled, the value as it
  // is, whatever the next one's bit behind it.
  static void expand(vi words, vi zeros, vi (&cells)[4], BFloat16Cells) {
    const __m512i table = _mm512_load_si512(Zeros ? kSigned32.bits : kSigned16.bits);
    for (int i = 0; i < 4; ++i) {
      vi at = vi(vu(words) >> 4 * i);
      if (Zeros) {
        at = (at & splat_int(0x000f000f)) | splat_int(0x00100010);
        at = vi(_mm512_sub_epi16(__m512i(at), __m512i(zeros)));
      }
      cells[i] = vi(_mm512_permutexvar_epi16(__m512i(at), table));
    }
  }
#endif
};

template <class F, class A>
constexpr int kCells = F::kPerWord / A::kSteps;  // of one word, in the order of k

// Zero points of a panel's columns as `expand` takes them.
inline void widen_zeros(const uint8_t* from, Cell* to) {
  for (int64_t i = 0; i < kPanel; i += W) {
    vb bytes;
    std::memcpy(&bytes, from + i, sizeof bytes);
    const vi wide = __builtin_convertvector(bytes, vi);
    store_cells(to + i, wide | wide << 16);
  }
}

// Writes the cells of `words` words of a panel down: for many rows of x, which then share them.
template <class F, class A>
inline void expand_block(const Cell* panel, int64_t words, const Cell* zeros, Cell* cells) {
  constexpr int NC = kCells<F, A>;
  for (int64_t i = 0; i < words; ++i, panel += kPanel, cells += NC * kPanel) {
    for (int64_t column = 0; column < kPanel; column += W) {
      vi made[NC];
      F::expand(load_cells(panel + column), F::kZeros ? load_cells(zeros + column) : vi{}, made, A{});
      for (int c = 0; c < NC; ++c) store_cells(cells + c * kPanel + column, made[c]);
    }
  }
}

// What `tile` does, with cells that are made in registers: for so few rows that this costs less than writing them down.
template <class F, class A, int MR>
inline void stream_tile(const Cell* x, int64_t ldx, const Cell* panel, int64_t words, const Cell* zeros, Cell* sums,
                        const float* scale) {
  constexpr int NV = kTileVectors, NC = kCells<F, A>;
  for (int64_t column = 0; column < kPanel; column += NV * W) {
    typename A::Sum acc[MR][NV] = {};
    vi zero[NV] = {};
    if (F::kZeros)
      for (int v = 0; v < NV; ++v) zero[v] = load_cells(zeros + column + v * W);
    const Cell* at = panel + column;
    for (int64_t i = 0; i < words; ++i, at += kPanel) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        // Lines are asked for in the order of memory, past the end of the panel in the next one.
        if (v * W % 16 == 0) __builtin_prefetch(at + kAhead + v * W);
        vi cells[NC];
        F::expand(load_cells(at + v * W), zero[v], cells, A{});
#pragma GCC unroll 8
        for (int c = 0; c < NC; ++c)
#pragma GCC unroll 4
          for (int m = 0; m < MR; ++m) acc[m][v] = A::dot(acc[m][v], splat_int(x[m * ldx + i * NC + c]), cells[c]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t to = column + v * W;
        add_sums(acc[m][v], scale ? scale + to : nullptr, sums + m * kPanel + to);
      }
  }
}

}  // namespace ingot
