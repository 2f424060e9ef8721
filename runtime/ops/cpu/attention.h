// The inner part of paged_attention: the query rows of one KV head against a range of keys, softmax in float32 (flash
// style, arXiv 2205.14135). Keys are taken in tiles of 64 at fixed positions, and every row adds its keys in order, so
// what else is in the tile does not change a row's result.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "parallel.h"
#include "tensor.h"
#include "vmath.h"

namespace ingot {

constexpr int64_t kKeys = 64;       // keys per tile
constexpr int64_t kMaxRows = 128;   // query rows (positions x heads of the group) of one task
constexpr int64_t kDirectRows = 4;  // up to here keys and values are converted in registers, not into a tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A quantized cache: its elements are codes, with a scale for each token and KV head beside them.
template <class T>
constexpr bool kScaled = sizeof(T) == 1;

struct Call {
  View q, k, v, tables, positions;
  const float *k_scale = nullptr, *v_scale = nullptr;  // [blocks, block_size, kv_heads], of quantized caches
  const float* sinks = nullptr;  // [heads] or null
  float scale = 1, softcap = 0;
  int64_t window = 0;
  int64_t batch = 0, heads = 0, groups = 0, length = 0, dim = 0, v_dim = 0, v_pad = 0, kv_heads = 0, block_size = 0;
  int64_t capacity = 0;  // positions that a row's block table can hold
  void* out = nullptr;

  int64_t position(int64_t b, int64_t t) const {
    return positions.as<int64_t>()[b * positions.strides[0] + t * positions.strides[1]];
  }
  int64_t block(int64_t b, int64_t index) const {
    return tables.as<int32_t>()[b * tables.strides[0] + index * tables.strides[1]];
  }
  // Key and value of KV head 0 at a position of row b.
  template <class T>
  const T* key(int64_t b, int64_t p) const {
    return k.as<T>() + block(b, p / block_size) * k.strides[0] + p % block_size * k.strides[1];
  }
  template <class T>
  const T* value(int64_t b, int64_t p) const {
    return v.as<T>() + block(b, p / block_size) * v.strides[0] + p % block_size * v.strides[1];
  }
  // Where the scales of KV head 0 at a position of row b lie.
  int64_t scale_index(int64_t b, int64_t p) const {
    return (block(b, p / block_size) * block_size + p % block_size) * kv_heads;
  }
  // The keys [first, second) that a token at position p may see.
  std::pair<int64_t, int64_t> visible(int64_t p) const {
    if (p < 0) return {0, 0};
    return {window > 0 ? std::max<int64_t>(0, p - window + 1) : 0, std::min(p + 1, capacity)};
  }
};

// The query rows of one task and their running softmax: out = acc / sum, all relative to `top`.
struct Rows {
  int64_t count = 0;
  float *q, *acc, *scores, *keys, *values;  // [count, dim], [count, v_pad], [count, kKeys], [kKeys, dim], [kKeys, v_pad]
  int64_t first[kMaxRows], last[kMaxRows];        // visible keys of each row
  float top[kMaxRows], sum[kMaxRows];
};

// Floats that the rows of one KV head keep, and that are used tile by tile and may serve several heads.
inline int64_t kept_floats(const Call& c, int64_t count) { return count * (c.dim + c.v_pad); }
inline int64_t tile_floats(const Call& c, int64_t count) { return count * kKeys + kKeys * (c.dim + c.v_pad); }

// Rows (position t, head of the group g), g fastest: rows that stand together see the same keys.
inline void load_rows(const Call& c, int64_t b, int64_t kv_head, int64_t t0, int64_t t1, Rows& rows, float* kept,
                      float* tile) {
  rows.count = (t1 - t0) * c.groups;
  rows.q = kept;
  rows.acc = rows.q + rows.count * c.dim;
  rows.scores = tile;
  rows.keys = rows.scores + rows.count * kKeys;
  rows.values = rows.keys + kKeys * c.dim;
  std::fill(rows.acc, rows.acc + rows.count * c.v_pad, 0.0f);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t t = t0 + r / c.groups, head = kv_head * c.groups + r % c.groups;
    std::tie(rows.first[r], rows.last[r]) = c.visible(c.position(b, t));
    rows.top[r] = -kInfinity;
    rows.sum[r] = 0;
    const int64_t offset = b * c.q.strides[0] + head * c.q.strides[1] + t * c.q.strides[2];
    float* to = rows.q + r * c.dim;
    if (c.q.dtype == kFloat32) widen(c.q.as<float>() + offset, c.dim, to);
    else if (c.q.dtype == kBFloat16) widen(c.q.as<bfloat16>() + offset, c.dim, to);
    else widen(c.q.as<float16>() + offset, c.dim, to);
  }
}

// One row of a tile: scores become weights exp(s - top) in columns [a, b) and the running sum and top move on.
inline void soften(const Call& c, Rows& rows, int64_t r, int64_t a, int64_t b) {
  float* scores = rows.scores + r * kKeys;
  // What lies outside is another row's or nobody's and may hold anything, NaN included.
  std::fill(scores, scores + a, -kInfinity);
  std::fill(scores + b, scores + kKeys, -kInfinity);
  vf peak = splat(-kInfinity);
  for (int64_t i = 0; i < kKeys; i += W) {
    vf s = load(scores + i) * c.scale;
    if (c.softcap > 0) s = s == -kInfinity ? s : c.softcap * vtanh(s / c.softcap);
    store(scores + i, s);
    peak = vmax(peak, s);
  }
  float top = rows.top[r];
  for (int l = 0; l < W; ++l) top = std::max(top, peak[l]);
  const float shrink = rows.top[r] == top ? 1.0f : std::exp(rows.top[r] - top);
  vf sum = zero();
  for (int64_t i = 0; i < kKeys; i += W) {
    const vf s = load(scores + i), weight = s == -kInfinity ? zero() : vexp(s - top);
    store(scores + i, weight);
    sum += weight;
  }
  float total[4];
  fold4(sum, sum, sum, sum, total);
  rows.sum[r] = rows.sum[r] * shrink + total[0];
  rows.top[r] = top;
  if (shrink != 1.0f) {
    for (int64_t i = 0; i < c.v_pad; i += W) store(rows.acc + r * c.v_pad + i, load(rows.acc + r * c.v_pad + i) * shrink);
  }
}

// acc[m] += weights[m, a..b) times values[a..b), for MR rows and NV vectors of the value dimension; a head's values lie
// `head` elements after the given pointers.
template <int MR, int NV, class T>
void mix(float* acc, int64_t ld, const float* weights, const T* const* values, int64_t head, int64_t d, int64_t a,
         int64_t b) {
  vf sums[MR][NV];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) sums[m][n] = load(acc + m * ld + d + n * W);
  for (int64_t key = a; key < b; ++key) {
    vf value[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) value[n] = load(values[key] + head + d + n * W);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const vf weight = splat(weights[m * kKeys + key]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) sums[m][n] = fma(weight, value[n], sums[m][n]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) store(acc + m * ld + d + n * W, sums[m][n]);
}

template <int MR, class T>
void mix_all(float* acc, int64_t ld, const float* weights, const T* const* values, int64_t head, int64_t a, int64_t b) {
  if (a >= b) return;
  int64_t d = 0;
  for (; d + 2 * W <= ld; d += 2 * W) mix<MR, 2>(acc, ld, weights, values, head, d, a, b);
  for (; d < ld; d += W) mix<MR, 1>(acc, ld, weights, values, head, d, a, b);
}

// One tile: scores, softmax, weighted values, for keys in columns [low, high).
template <class T>
void attend_tile(const Call& c, Rows& rows, const T* const* keys, const T* const* values, int64_t base, int64_t low,
                 int64_t high) {
  for (int64_t r0 = 0; r0 < rows.count; r0 += 4) {
    const int64_t n = std::min<int64_t>(4, rows.count - r0);
    int64_t a[4], b[4], from = kKeys, to = 0, start = 0, stop = kKeys;
    for (int64_t i = 0; i < n; ++i) {
      a[i] = std::max(low, rows.first[r0 + i] - base);
      b[i] = std::min(high, rows.last[r0 + i] - base);
      if (a[i] < b[i]) from = std::min(from, a[i]), to = std::max(to, b[i]);
      start = std::max(start, a[i]);
      stop = std::min(stop, b[i]);
    }
    if (from >= to) continue;  // nothing here is visible to these rows
    float* scores = rows.scores + r0 * kKeys;
    std::fill(scores, scores + n * kKeys, 0.0f);
    const float* q = rows.q + r0 * c.dim;
    int64_t key = from;
    for (; key + kColumns <= to; key += kColumns) rows_times<kColumns>(q, c.dim, n, keys + key, c.dim, scores + key, kKeys);
    for (; key < to; ++key) rows_times<1>(q, c.dim, n, keys + key, c.dim, scores + key, kKeys);
    for (int64_t i = 0; i < n; ++i) if (a[i] < b[i]) soften(c, rows, r0 + i, a[i], b[i]);
    float* acc = rows.acc + r0 * c.v_pad;
    if (n == 4 && start < stop) {
      // Keys that all four see go together; the ragged ends, row by row, keep every row's keys in order.
      for (int64_t i = 0; i < 4; ++i) mix_all<1>(acc + i * c.v_pad, c.v_pad, scores + i * kKeys, values, 0, a[i], start);
      mix_all<4>(acc, c.v_pad, scores, values, 0, start, stop);
      for (int64_t i = 0; i < 4; ++i) mix_all<1>(acc + i * c.v_pad, c.v_pad, scores + i * kKeys, values, 0, stop, b[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) mix_all<1>(acc + i * c.v_pad, c.v_pad, scores + i * kKeys, values, 0, a[i], b[i]);
    }
  }
}

// One tile, keys [max(base, from), min(base + kKeys, to)), for the rows of one batch entry and KV head.
template <class T>
void attend(const Call& c, int64_t b, int64_t kv_head, Rows& rows, int64_t base, int64_t from, int64_t to) {
  const int64_t low = std::max<int64_t>(0, from - base), high = std::min(kKeys, to - base);
  const T *keys[kKeys], *values[kKeys];
  for (int64_t i = low; i < high; ++i) {
    keys[i] = c.key<T>(b, base + i) + kv_head * c.k.strides[2];
    values[i] = c.value<T>(b, base + i) + kv_head * c.v.strides[2];
  }
  if constexpr (!kScaled<T>) {
    if (rows.count <= kDirectRows && c.v_dim == c.v_pad) {
      attend_tile(c, rows, keys, values, base, low, high);
      return;
    }
  }
  const float *wide_keys[kKeys], *wide_values[kKeys];
  for (int64_t i = low; i < high; ++i) {
    wide_keys[i] = rows.keys + i * c.dim;
    wide_values[i] = rows.values + i * c.v_pad;
    widen(keys[i], c.dim, rows.keys + i * c.dim);
    widen(values[i], c.v_dim, rows.values + i * c.v_pad);
    std::fill(rows.values + i * c.v_pad + c.v_dim, rows.values + (i + 1) * c.v_pad, 0.0f);
    if constexpr (kScaled<T>) {
      const int64_t at = c.scale_index(b, base + i) + kv_head;
      for (int64_t d = 0; d < c.dim; ++d) rows.keys[i * c.dim + d] *= c.k_scale[at];
      for (int64_t d = 0; d < c.v_dim; ++d) rows.values[i * c.v_pad + d] *= c.v_scale[at];
    }
  }
  attend_tile(c, rows, wide_keys, wide_values, base, low, high);
}

}  // namespace ingot
