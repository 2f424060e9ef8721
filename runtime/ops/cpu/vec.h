// Vectors of the width the target has (fixed when the file is compiled), and the one tile every dot product goes through.
// AVX-512: 16 floats; AVX2 with FMA: 8; anything else: 4, by GCC's own vector extensions.
//
// What is promised about rounding: a dot product is cut into blocks of kBlockK, each summed lane by lane and folded in
// one fixed order, and the blocks are added in order. So a row's result does not depend on how many rows are computed
// with it, on the tile it fell into, or on the number of threads. It may differ between instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ingot {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int64_t kBlockK = 512;  // 4 input rows and 2 weight rows of a block are 12 KiB of L1
constexpr int kColumns = W == 16 ? 4 : 2;  // weight rows per tile with four input rows; 3 fit AVX2's registers, but run slower

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
struct float8 { uint8_t bits; };  // e4m3fn

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}
// Exponent and mantissa in their places, the exponent's bias put right by a product that also serves subnormal numbers.
// NaN becomes 480: who stores float8 keeps NaN in the scale.
inline float to_float(float8 x) {
  const uint32_t wide = uint32_t(x.bits & 0x80) << 24 | uint32_t(x.bits & 0x7f) << 20;
  float out;
  std::memcpy(&out, &wide, 4);
  return out * 0x1p120f;
}
inline float to_float(float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return float(half);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding must not turn a NaN into an infinity
  out->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, float16* out) {
  const _Float16 half = _Float16(x);
  std::memcpy(out, &half, 2);
}

inline vf splat(float x) { return x - vf{}; }
inline vi splat_int(int32_t x) { return x - vi{}; }
inline vf zero() { return vf{}; }

inline vf load(const float* p) {
  vf out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

#if defined(__AVX512F__)
inline vf load(const bfloat16* p) {
  return vf(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)));
}
inline vf load(const float16* p) { return vf(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))); }
inline vf load(const int8_t* p) { return vf(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))); }
inline vf load(const float8* p) {
  const vu x = vu(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  return vf((x & 0x80u) << 24 | (x & 0x7fu) << 20) * 0x1p120f;
}
inline vf fma(vf a, vf b, vf c) { return vf(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
inline vf vmax(vf a, vf b) { return vf(_mm512_max_ps(__m512(a), __m512(b))); }
#elif defined(__AVX2__) && defined(__FMA__)
inline vf load(const bfloat16* p) {
  return vf(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16)));
}
#if defined(__F16C__)
inline vf load(const float16* p) { return vf(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))); }
#endif
inline vf load(const int8_t* p) { return vf(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))); }
inline vf load(const float8* p) {
  const vu x = vu(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  return vf((x & 0x80u) << 24 | (x & 0x7fu) << 20) * 0x1p120f;
}
inline vf fma(vf a, vf b, vf c) { return vf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
inline vf vmax(vf a, vf b) { return vf(_mm256_max_ps(__m256(a), __m256(b))); }
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
#endif

// Element types without an instruction of their own on this target go through memory.
template <class T>
inline vf load(const T* p) {
  float out[W];
  for (int i = 0; i < W; ++i) out[i] = to_float(p[i]);
  return load(out);
}

// The last, incomplete vector of a row, filled up with zeros. Not inlined: it would crowd the loops that rarely need it.
template <class T>
__attribute__((noinline)) vf load_part(const T* p, int64_t count) {
  float out[W] = {};
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i]);
  return load(out);
}

template <class T>
inline void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Keeps a value in a register: the compiler would rather load a weight again for every input row.
inline void keep(vf& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE__)
  asm("" : "+x"(x));
#endif
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// Sums of four vectors' lanes, each as ((0+1)+(2+3)) + ((4+5)+(6+7)), upper half of 16 folded onto the lower first.
inline void fold4(vf a, vf b, vf c, vf d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto half = [](vf x) {
    return _mm256_add_ps(_mm512_castps512_ps256(__m512(x)),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(__m512(x)), 1)));
  };
#else
  const auto half = [](vf x) { return __m256(x); };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  const vf rows[4] = {a, b, c, d};
  for (int r = 0; r < 4; ++r) out[r] = (rows[r][0] + rows[r][1]) + (rows[r][2] + rows[r][3]);
#endif
}

// sums[m * ld + n] += x[m] . w[n] over one block of k elements; x rows are `ldx` apart, w rows are wherever they are.
// With `Ahead`, one line at `next` is asked for (into L2) for each line of weights used, in the order of memory: read
// this way the memory gives up to 1.4 times what it does to the rows side by side.
template <int MR, int NR, bool Ahead = false, class T>
inline void dot_tile(const float* x, int64_t ldx, const T* const* w, int64_t k, float* sums, int64_t ld,
                     const char* next = nullptr) {
  static_assert(NR <= 4, "fold4 takes four columns");
  vf acc[MR][NR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) acc[m][n] = zero();
  const auto step = [&](auto&& read_x, auto&& read_w) __attribute__((always_inline)) {
    vf wide[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      wide[n] = read_w(w[n]);
      if constexpr (MR > 1) keep(wide[n]);
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      vf row = read_x(x + m * ldx);
      if constexpr (NR > 1) keep(row);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(row, wide[n], acc[m][n]);
    }
  };
  int64_t i = 0;
  const auto full = [&](const auto* p) __attribute__((always_inline)) { return load(p + i); };
  const auto part = [&](const auto* p) __attribute__((always_inline)) { return load_part(p + i, k - i); };
  if constexpr (Ahead) {
    constexpr int64_t line = 64 / sizeof(T);
    for (; i + line <= k;) {
      for (int n = 0; n < NR; ++n) __builtin_prefetch(next + i * int64_t(sizeof(T)) * NR + n * 64, 0, 2);
      for (const int64_t end = i + line; i < end; i += W) step(full, full);
    }
  }
  for (; i + W <= k; i += W) step(full, full);
  if (i < k) step(part, part);
  // Four sums at a time, whatever rows and columns they belong to.
#pragma GCC unroll 4
  for (int at = 0; at < MR * NR; at += 4) {
    const auto sum = [&](int j) { return acc[(at + j) % (MR * NR) / NR][(at + j) % (MR * NR) % NR]; };
    float folded[4];
    fold4(sum(0), sum(1), sum(2), sum(3), folded);
#pragma GCC unroll 4
    for (int j = at; j < at + 4 && j < MR * NR; ++j) sums[j / NR * ld + j % NR] += folded[j - at];
  }
}

// The same for any number of rows of x: sums[row * ld + column] for rows [0, m) and NR rows of w.
template <int NR, bool Ahead = false, class T>
inline void rows_times(const float* x, int64_t ldx, int64_t m, const T* const* w, int64_t k, float* sums, int64_t ld,
                       const char* next = nullptr) {
  int64_t row = 0;
  for (; row + 4 <= m; row += 4) dot_tile<4, NR, Ahead>(x + row * ldx, ldx, w, k, sums + row * ld, ld, next);
  x += row * ldx;
  sums += row * ld;
  if (m - row == 3) dot_tile<3, NR, Ahead>(x, ldx, w, k, sums, ld, next);
  else if (m - row == 2) dot_tile<2, NR, Ahead>(x, ldx, w, k, sums, ld, next);
  else if (m - row == 1) dot_tile<1, NR, Ahead>(x, ldx, w, k, sums, ld, next);
}

}  // namespace ingot
