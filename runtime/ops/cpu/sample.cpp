// sample: one token per row of logits, greedy or by Gumbel-max over what min-p, top-k and top-p leave.
//
// Nothing is sorted but a few candidates. min-p and top-k are thresholds on z = logits / temperature; a lower bound of
// the k-th largest comes from the maxima of small blocks, so that only what may pass it is looked at again. top-p finds
// the histogram bin in which the mass is reached and sorts that bin alone. The noise is a hash of (seed, position,
// index), so a row's token does not depend on its batch.
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"
#include "tensor.h"
#include "vmath.h"

namespace ingot {
namespace {

constexpr uint32_t kGolden = 0x9E3779B9u;
constexpr int64_t kBlock = 64;          // logits per block maximum
constexpr int kBins = 512;              // of width 1/16 below the maximum; the last takes all that is smaller
constexpr float kBinsPerUnit = 16.0f;
constexpr float kMargin = 1e-3f;        // more than rounding can add up to, for |z| up to 1000
constexpr float kLn2 = 0.693147180559945f;

template <class U>
inline U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

uint32_t row_hash(int64_t seed, int64_t position) {
  uint32_t h = mix(uint32_t(seed) + kGolden);
  h = mix(h ^ uint32_t(uint64_t(seed) >> 32));
  return mix(h ^ uint32_t(position));
}

// (r >> 8) + 0.5 is rounded to float32, so the highest draw would be u = 1 and its noise infinite: one token in a
// hundred of a large vocabulary would be drawn by that alone. It is taken as the next smaller number.
constexpr float kLargestUniform = 1.0f - 0x1p-24f;

float gumbel(uint32_t hash, int64_t index) {
  const uint32_t r = mix(hash ^ uint32_t(index) * kGolden);
  const float u = std::min((float(r >> 8) + 0.5f) * 0x1p-24f, kLargestUniform);
  return -std::log(-std::log(u));
}

// First index of the largest; a NaN counts as larger than anything, as in torch and numpy.
int64_t argmax(const float* z, int64_t n) {
  vf best = splat(-std::numeric_limits<float>::infinity());
  vi bad = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf x = load(z + i);
    bad |= x != x;
    best = vmax(best, x);
  }
  float top = best[0];
  bool nan = false;
  for (int l = 0; l < W; ++l) {
    top = std::max(top, best[l]);
    nan |= bad[l] != 0;
  }
  for (; i < n; ++i) {
    nan |= z[i] != z[i];
    top = std::max(top, z[i]);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (nan ? z[j] != z[j] : z[j] == top) return j;
  }
  return 0;
}

// Calls visit(index, z) for every z >= low, in order.
template <class F>
void for_each_from(const float* z, int64_t n, float low, F&& visit) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    const vf top = vmax(vmax(load(z + i), load(z + i + W)), vmax(load(z + i + 2 * W), load(z + i + 3 * W)));
    if (!any(top >= low)) continue;
    for (int64_t j = i; j < i + 4 * W; ++j) if (z[j] >= low) visit(j, z[j]);
  }
  for (; i < n; ++i) if (z[i] >= low) visit(i, z[i]);
}

float kth_largest(const float* z, int64_t n, int64_t k, std::vector<float>& values) {
  values.clear();
  const int64_t blocks = n / kBlock;
  if (k <= blocks) {
    for (int64_t b = 0; b < blocks; ++b) {
      vf top = load(z + b * kBlock);
      for (int64_t i = W; i < kBlock; i += W) top = vmax(top, load(z + b * kBlock + i));
      float best = top[0];
      for (int l = 1; l < W; ++l) best = std::max(best, top[l]);
      values.push_back(best);
    }
    // k blocks reach this bound, so at least k values do, and few more.
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    const float bound = values[size_t(k - 1)];
    values.clear();
    for_each_from(z, n, bound, [&](int64_t, float value) { values.push_back(value); });
  } else {
    values.assign(z, z + n);
  }
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
  return values[size_t(k - 1)];
}

// The z of the last token of the smallest set of largest probabilities among z >= low that reaches top_p.
float nucleus(const float* z, int64_t n, float low, float top, float top_p, std::vector<float>& values) {
  // Four copies, since neighbours often fall into one bin and each addition would wait for the one before.
  double copies[4][kBins] = {}, mass[kBins], total = 0;
  const auto bin_of = [&](float value) { return int(std::min(float(kBins - 1), (top - value) * kBinsPerUnit)); };
  int64_t i = 0;
  const vf start = splat(low), peak = splat(top), last_bin = splat(float(kBins - 1));
  for (; i + W <= n; i += W) {
    const vf value = load(z + i);
    const vi kept = value >= start;
    if (!any(kept)) continue;
    const vf p = kept ? vexp(value - peak) : zero();
    const vf place = (peak - value) * kBinsPerUnit;
    const vi bin = __builtin_convertvector(place < last_bin ? place : last_bin, vi);
    for (int l = 0; l < W; ++l) copies[l % 4][bin[l]] += p[l];
  }
  for (; i < n; ++i) if (z[i] >= low) copies[0][bin_of(z[i])] += vexp(splat(z[i] - top))[0];
  for (int bin = 0; bin < kBins; ++bin) {
    mass[bin] = (copies[0][bin] + copies[1][bin]) + (copies[2][bin] + copies[3][bin]);
    total += mass[bin];
  }
  const double wanted = double(top_p) * total;
  int bin = 0;
  double before = 0;
  while (bin < kBins - 1 && before + mass[bin] < wanted) before += mass[bin++];
  // Within the bin the order decides. The bin's own bounds are found by the same formula as above.
  values.clear();
  const float floor = bin == kBins - 1 ? low : std::max(low, top - float(bin + 2) / kBinsPerUnit);
  for_each_from(z, n, floor, [&](int64_t, float value) { if (bin_of(value) == bin) values.push_back(value); });
  std::sort(values.begin(), values.end(), std::greater<float>());
  float last = top;
  for (float value : values) {
    if (before >= wanted && before > 0) break;
    before += vexp(splat(value - top))[0];
    last = value;
  }
  return last;
}

int64_t noisy_argmax(const float* z, int64_t n, float low, uint32_t hash) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t chosen = -1;
  const auto consider = [&](int64_t index) {
    const float value = z[index] + gumbel(hash, index);
    if (value > best || chosen < 0) {
      best = value;
      chosen = index;
    }
  };
  vu lane;
  for (int l = 0; l < W; ++l) lane[l] = uint32_t(l);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf value = load(z + i);
    const vi kept = value >= low;
    if (!any(kept)) continue;
    // A bound on the noise rules out nearly all without a logarithm: -log(-log u) <= -log(1 - u), and reading a
    // float's bits as a number never overestimates its binary logarithm. What may win is computed exactly.
    const vu r = mix(vu((lane + uint32_t(i)) * kGolden ^ hash));
    vf u = (__builtin_convertvector(vi(r >> 8), vf) + 0.5f) * 0x1p-24f;
    u = u > kLargestUniform ? splat(kLargestUniform) : u;
    const vf bound = fma(to_vector(as_int(1.0f - u)), splat(-0x1p-23f * kLn2), splat(127.0f * kLn2 + kMargin));
    if (!any(kept & (value + bound >= best - kMargin * std::max(1.0f, std::abs(best) * 1e-3f)))) continue;
    for (int l = 0; l < W; ++l) if (kept[l]) consider(i + l);
  }
  for (; i < n; ++i) if (z[i] >= low) consider(i);
  return chosen < 0 ? argmax(z, n) : chosen;
}

struct Row {
  float temperature, top_p, min_p;
  int32_t top_k;
  int64_t seed, position;
};

int64_t sample_row(const float* logits, int64_t n, const Row& row) {
  if (!(row.temperature > 0)) return argmax(logits, n);
  struct ZTag {};
  float* z = scratch<ZTag>(n);
  for (int64_t i = 0; i < n; ++i) z[i] = logits[i] / row.temperature;
  const float top = z[argmax(z, n)];
  if (!(std::abs(top) <= std::numeric_limits<float>::max())) return argmax(z, n);  // NaN or infinity: nothing to draw
  static thread_local std::vector<float> values;
  float low = -std::numeric_limits<float>::infinity();
  if (row.min_p > 0) low = top + std::log(row.min_p);
  // With fewer than k tokens over min-p's threshold the k-th largest lies below it and changes nothing.
  if (row.top_k > 0 && row.top_k < n) low = std::max(low, kth_largest(z, n, row.top_k, values));
  if (row.top_p < 1) low = std::max(low, nucleus(z, n, low, top, row.top_p, values));
  return noisy_argmax(z, n, low, row_hash(row.seed, row.position));
}

template <class T>
T at(const View& v, int64_t i) { return v.as<T>()[i * v.strides[0]]; }

void check(const View& v, int64_t rows, int32_t dtype, const char* message) {
  require(v.dim == 1 && v.sizes[0] == rows && v.dtype == dtype, message);
}

void sample(AtenTensorHandle logits_handle, AtenTensorHandle temperature_handle, AtenTensorHandle top_k_handle,
            AtenTensorHandle top_p_handle, AtenTensorHandle min_p_handle, AtenTensorHandle seeds_handle,
            AtenTensorHandle positions_handle, AtenTensorHandle* ret) {
  const View logits(logits_handle), temperature(temperature_handle), top_k(top_k_handle), top_p(top_p_handle),
      min_p(min_p_handle), seeds(seeds_handle), positions(positions_handle);
  require(logits.dim == 2 && logits.dtype == kFloat32, "logits must be float32 [batch, vocabulary]");
  const int64_t rows = logits.sizes[0], n = logits.sizes[1];
  require(n > 0 && (logits.strides[1] == 1 || n == 1), "logits must be contiguous in the vocabulary");
  check(temperature, rows, kFloat32, "temperature must be float32 [batch]");
  check(top_k, rows, kInt32, "top_k must be int32 [batch]");
  check(top_p, rows, kFloat32, "top_p must be float32 [batch]");
  check(min_p, rows, kFloat32, "min_p must be float32 [batch]");
  check(seeds, rows, kInt64, "seeds must be int64 [batch]");
  check(positions, rows, kInt64, "positions must be int64 [batch]");
  *ret = empty(1, &rows, kInt64);
  int64_t* out = View(*ret).as<int64_t>();
  parallel_for(rows, rows * n * 4, [&](int64_t i) {
    out[i] = sample_row(logits.as<float>() + i * logits.strides[0], n,
                        {at<float>(temperature, i), at<float>(top_p, i), at<float>(min_p, i), at<int32_t>(top_k, i),
                         at<int64_t>(seeds, i), at<int64_t>(positions, i)});
  });
}

}  // namespace
}  // namespace ingot

extern "C" INGOT_API AOTITorchError aoti_torch_cpu_sample(AtenTensorHandle logits, AtenTensorHandle temperature,
                                                          AtenTensorHandle top_k, AtenTensorHandle top_p,
                                                          AtenTensorHandle min_p, AtenTensorHandle seeds,
                                                          AtenTensorHandle positions, AtenTensorHandle* ret) {
  return ingot::guarded(
      "sample", [&] { ingot::sample(logits, temperature, top_k, top_p, min_p, seeds, positions, ret); });
}
