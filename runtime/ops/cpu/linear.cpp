// linear_dense, and products with int8 weights that have one scale per row: x [..., k] times the transpose of a
// row-major weight [n, k], summed in float32.
//
// Few rows (decode) stream each weight row once from memory and convert it in registers. Many rows (prefill) first
// widen a panel of weight rows to float32, which then serves all input rows from L2. Both run the same tile in the
// same order, so a row's result is bit-identical whatever batch or chunk it is in (see vec.h).
#include "linear.h"
#include "parallel.h"
#include "vec.h"

namespace ingot {
namespace {

constexpr int64_t kFewRows = 8;              // up to here weights are converted in registers
constexpr int64_t kRowBlock = 128;           // input rows per task with many rows: their partial sums stay in L2
constexpr int64_t kStrip = 4;                // input rows that pass over a panel together
constexpr int64_t kPanel = 48;               // weight rows per panel: 48 * kBlockK floats are 96 KiB of L2
constexpr int64_t kStreamBytes = 512 << 10;  // weight bytes per task with few rows: its first ones are not read ahead

struct PanelTag {};
struct SumsTag {};
struct InputTag {};

// Adds a block of k columns for input rows [0, m) and `count` weight rows that lie `ldw` apart.
template <int NR, bool Ahead = false, class T>
inline void panel_times(const float* x, int64_t ldx, int64_t m, const T* w, int64_t ldw, int64_t count, int64_t k,
                        float* sums, int64_t ld, const char* next = nullptr) {
  int64_t column = 0;
  for (; column + NR <= count; column += NR) {
    const T* rows[NR];
    for (int n = 0; n < NR; ++n) rows[n] = w + (column + n) * ldw;
    const char* near = Ahead ? next + column * k * int64_t(sizeof(T)) : nullptr;
    rows_times<NR, Ahead>(x, ldx, m, rows, k, sums + column, ld, near);
  }
  for (; column < count; ++column) {
    const T* row = w + column * ldw;
    rows_times<1>(x, ldx, m, &row, k, sums + column, ld);
  }
}

template <class O>
void finish_as(const Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, int64_t ld) {
  const int64_t count = n1 - n0;
  for (int64_t m = m0; m < m1; ++m, sums += ld) {
    if (p.row_scale) for (int64_t i = 0; i < count; ++i) sums[i] *= p.row_scale[m];
    if (p.scale) for (int64_t i = 0; i < count; ++i) sums[i] *= p.scale[n0 + i];
    if (p.bias) for (int64_t i = 0; i < count; ++i) sums[i] += p.bias[n0 + i];
    O* out = static_cast<O*>(p.out) + m * p.n + n0;
    for (int64_t i = 0; i < count; ++i) from_float(sums[i], out + i);
  }
}

}  // namespace

void finish(const Product& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* sums, int64_t ld) {
  if (p.out_type == kFloat32) finish_as<float>(p, m0, m1, n0, n1, sums, ld);
  else if (p.out_type == kBFloat16) finish_as<bfloat16>(p, m0, m1, n0, n1, sums, ld);
  else finish_as<float16>(p, m0, m1, n0, n1, sums, ld);
}

namespace {

// All of k for a handful of rows and weight rows [n0, n1), four weight rows (streams) at a time.
template <class T>
void stream_weights(const Product& p, const T* w, int64_t n0, int64_t n1) {
  constexpr int64_t streams = 4, strip = 64;
  for (int64_t s0 = n0; s0 < n1; s0 += strip) {
    const int64_t s1 = std::min(n1, s0 + strip);
    float sums[kFewRows * strip];
    std::fill(sums, sums + p.m * strip, 0.0f);
    for (int64_t n = s0; n < s1; n += streams) {
      const int64_t count = std::min(streams, s1 - n);
      for (int64_t k = 0; k < p.k; k += kBlockK) {
        const int64_t block = std::min(kBlockK, p.k - k);
        const T* rows = w + n * p.k + k;
        float* to = sums + n - s0;
        // While these rows are multiplied the next ones are read. They lie together, so their blocks of k do not matter.
        const T* after = w + (n + streams < n1 ? n + streams : n) * p.k + k * streams;
        const char* next = reinterpret_cast<const char*>(after);
        if (p.m <= 2) panel_times<4, true>(p.x + k, p.k, p.m, rows, p.k, count, block, to, strip, next);
        else panel_times<kColumns, true>(p.x + k, p.k, p.m, rows, p.k, count, block, to, strip, next);
      }
    }
    finish(p, 0, p.m, s0, s1, sums, strip);
  }
}

// A panel that lies in L2 against input rows [m0, m1), a few at a time: those stay in L1 for the whole panel.
void multiply_panel(const Product& p, int64_t m0, int64_t m1, int64_t k, const float* panel, int64_t ld, int64_t count,
                    int64_t block, float* sums) {
  for (int64_t m = m0; m < m1; m += kStrip) {
    panel_times<kColumns>(p.x + m * p.k + k, p.k, std::min(kStrip, m1 - m), panel, ld, count, block,
                          sums + (m - m0) * count, count);
  }
}

// Input rows [m0, m1) and weight rows [n0, n1), one widened panel per block of k.
template <class T>
void widened_panel(const Product& p, const T* w, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t count = n1 - n0, width = std::min(kBlockK, p.k), ld = (width + W - 1) / W * W;
  float *sums = scratch<SumsTag>((m1 - m0) * count), *panel = scratch<PanelTag>(count * ld);
  std::fill(sums, sums + (m1 - m0) * count, 0.0f);
  for (int64_t k = 0; k < p.k; k += kBlockK) {
    const int64_t block = std::min(kBlockK, p.k - k);
    // Also where nothing is to be widened: rows that lie a power of two apart would share few sets of the caches.
    for (int64_t n = 0; n < count; ++n) widen(w + (n0 + n) * p.k + k, block, panel + n * ld);
    multiply_panel(p, m0, m1, k, panel, ld, count, block, sums);
  }
  finish(p, m0, m1, n0, n1, sums, count);
}

template <class T>
void multiply(const Product& p, const T* w) {
  const int64_t bytes = p.n * p.k * int64_t(sizeof(T));
  if (p.m <= kFewRows) {
    const int64_t rows = std::max<int64_t>(4, kStreamBytes / (p.k * int64_t(sizeof(T)) + 1) / 4 * 4);
    // Small matrices still get a task or two per thread.
    const int64_t fair = (p.n / (2 * omp_get_max_threads()) + 3) / 4 * 4;
    const int64_t step = std::max<int64_t>(4, std::min(rows, fair));
    parallel_for((p.n + step - 1) / step, bytes * p.m,
                 [&](int64_t task) { stream_weights(p, w, task * step, std::min(p.n, (task + 1) * step)); });
    return;
  }
  // With few row blocks a narrow panel stays in L1 beside the input.
  const int64_t panel = p.m <= 16 ? 12 : kPanel;
  const int64_t row_blocks = (p.m + kRowBlock - 1) / kRowBlock, panels = (p.n + panel - 1) / panel;
  // Row blocks of one panel follow each other, so that its weights are still in cache.
  parallel_for(panels * row_blocks, p.n * p.k * p.m, [&](int64_t task) {
    const int64_t n0 = task / row_blocks * panel, m0 = task % row_blocks * kRowBlock;
    widened_panel(p, w, m0, std::min(p.m, m0 + kRowBlock), n0, std::min(p.n, n0 + panel));
  });
}

bool floating(int32_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

void linear_dense(AtenTensorHandle x_handle, AtenTensorHandle w_handle, AtenTensorHandle* bias, AtenTensorHandle* ret) {
  const View x(x_handle), w(w_handle);
  require(w.dim == 2 && w.contiguous(), "the weight must be [n, k] and contiguous");
  require(floating(w.dtype), "the weight must be float32, bfloat16 or float16");
  Product p = open_product(x, w.sizes[0], w.sizes[1], bias, ret);
  if (p.m == 0 || p.n == 0) return;
  read_rows(x, p);
  if (w.dtype == kFloat32) multiply(p, w.as<float>());
  else if (w.dtype == kBFloat16) multiply(p, w.as<bfloat16>());
  else multiply(p, w.as<float16>());
}

}  // namespace

void widen_row(const View& x, int64_t row, float* out) {
  const int64_t k = x.sizes[x.dim - 1], step = x.strides[x.dim - 1], offset = row_offset(x, row);
  const auto widen_from = [&](const auto* data) {
    if (step == 1) widen(data, k, out);
    else for (int64_t i = 0; i < k; ++i) out[i] = to_float(data[i * step]);
  };
  if (x.dtype == kFloat32) widen_from(x.as<float>() + offset);
  else if (x.dtype == kBFloat16) widen_from(x.as<bfloat16>() + offset);
  else widen_from(x.as<float16>() + offset);
}

void read_rows(const View& x, Product& p) {
  p.x = x.as<float>();
  if (x.dtype == kFloat32 && x.contiguous()) return;
  float* rows = scratch<InputTag>(p.m * p.k);
  for (int64_t row = 0; row < p.m; ++row) widen_row(x, row, rows + row * p.k);
  p.x = rows;
}

Product open_product(const View& x, int64_t n, int64_t columns, AtenTensorHandle* bias_handle, AtenTensorHandle* ret) {
  require(x.dim >= 1 && x.dim <= 16, "x must be [..., k] with at most 16 dimensions");
  require(floating(x.dtype), "x must be float32, bfloat16 or float16");
  require(x.sizes[x.dim - 1] == columns, "x's last dimension is not the weight's");
  Product p;
  p.k = columns;
  p.n = n;
  p.m = 1;
  int64_t sizes[16];
  for (int64_t d = 0; d + 1 < x.dim; ++d) p.m *= sizes[d] = x.sizes[d];
  sizes[x.dim - 1] = p.n;
  struct BiasTag {};
  if (bias_handle) {
    const View bias(*bias_handle);
    require(floating(bias.dtype) && bias.dim == 1 && bias.sizes[0] == p.n, "the bias must be floating point [n]");
    float* wide = scratch<BiasTag>(p.n);
    widen_row(bias, 0, wide);
    p.bias = wide;
  }
  *ret = empty(x.dim, sizes, x.dtype);
  p.out = View(*ret).data;
  p.out_type = x.dtype;
  return p;
}

void multiply_int8_channels(const Product& p, const int8_t* w) { multiply(p, w); }

}  // namespace ingot

extern "C" INGOT_API AOTITorchError aoti_torch_cpu_linear_dense(AtenTensorHandle x, AtenTensorHandle w,
                                                                AtenTensorHandle* bias, AtenTensorHandle* ret) {
  return ingot::guarded("linear_dense", [&] { ingot::linear_dense(x, w, bias, ret); });
}
