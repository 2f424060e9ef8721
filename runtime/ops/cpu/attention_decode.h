// One token per row against a tile of keys, for several KV heads at once: memory in the cache's own order.
//
// A head's key is a short piece of a token's row, so reading head by head leaves the hardware's prefetchers behind. Here
// keys are the outer loop and heads the inner one, and each small step asks for what the same step needs a little later,
// which keeps as many cache lines in flight as the core can hold.
#pragma once

#include "attention.h"

namespace ingot {

constexpr int64_t kAhead = 8;  // keys or values between the one in use and the one asked for

template <class T>
inline void ask_for(const T* p, int64_t count) {
  for (int64_t line = 0; line < count * int64_t(sizeof(T)); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + line);
  }
}

// Whether the tile below serves this call: every row of a head sees the same keys, and values are whole vectors.
inline bool one_token(const Call& c) { return c.length == 1 && c.v_dim == c.v_pad; }

template <class T>
void mix_rows(const Call& c, Rows& rows, const T* const* values, int64_t head, int64_t a, int64_t b) {
  for (int64_t r = 0; r < rows.count; r += 4) {
    float *acc = rows.acc + r * c.v_pad, *weights = rows.scores + r * kKeys;
    switch (rows.count - r) {
      case 1: mix_all<1>(acc, c.v_pad, weights, values, head, a, b); break;
      case 2: mix_all<2>(acc, c.v_pad, weights, values, head, a, b); break;
      case 3: mix_all<3>(acc, c.v_pad, weights, values, head, a, b); break;
      default: mix_all<4>(acc, c.v_pad, weights, values, head, a, b);
    }
  }
}

// Keys [max(base, from), min(base + kKeys, to)) for KV heads h0 .. h0 + heads; all of them must be visible.
template <class T>
void attend_together(const Call& c, int64_t b, int64_t h0, int64_t heads, Rows* rows, int64_t base, int64_t from,
                     int64_t to) {
  const int64_t low = std::max<int64_t>(0, from - base), high = std::min(kKeys, to - base);
  const int64_t seen = std::min(kKeys + kAhead, to - base);
  const T *keys[kKeys + kAhead], *values[kKeys + kAhead];
  for (int64_t i = low; i < seen; ++i) {
    keys[i] = c.key<T>(b, base + i) + h0 * c.k.strides[2];
    values[i] = c.value<T>(b, base + i) + h0 * c.v.strides[2];
  }
  for (int64_t h = 0; h < heads; ++h) std::fill(rows[h].scores, rows[h].scores + rows[h].count * kKeys, 0.0f);
  for (int64_t i = low; i < high;) {
    const int64_t n = i + kColumns <= high ? kColumns : 1;
    for (int64_t h = 0; h < heads; ++h) {
      const T* w[kColumns];
      for (int64_t j = 0; j < n; ++j) {
        w[j] = keys[i + j] + h * c.k.strides[2];
        if (i + j + kAhead < seen) ask_for(keys[i + j + kAhead] + h * c.k.strides[2], c.dim);
      }
      if (n == 1) rows_times<1>(rows[h].q, c.dim, rows[h].count, w, c.dim, rows[h].scores + i, kKeys);
      else rows_times<kColumns>(rows[h].q, c.dim, rows[h].count, w, c.dim, rows[h].scores + i, kKeys);
    }
    i += n;
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = low; j < std::min(high, low + kAhead); ++j) ask_for(values[j] + h * c.v.strides[2], c.v_dim);
    for (int64_t r = 0; r < rows[h].count; ++r) soften(c, rows[h], r, low, high);
  }
  for (int64_t i = low; i < high; i += kAhead) {
    const int64_t end = std::min(high, i + kAhead);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t j = i + kAhead; j < std::min(high, end + kAhead); ++j) ask_for(values[j] + h * c.v.strides[2], c.v_dim);
      mix_rows(c, rows[h], values, h * c.v.strides[2], i, end);
    }
  }
}

}  // namespace ingot
