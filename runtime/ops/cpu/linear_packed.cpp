// linear_packed: x [..., k] times the transpose of a weight [n, k] that was packed into panels when the artifact was
// built (see packed.h for the layout and for what is promised about rounding).
//
// One or two rows (decode) read every panel once, at the speed of memory, and make cells in registers. More rows
// (prefill) first write a block of k of the panel down as cells, which then serve all of them from the cache.
#include <cstring>

#include "linear.h"
#include "packed_formats.h"
#include "packed_rows.h"

namespace ingot {
namespace {

constexpr int64_t kStreamRows = 2;           // up to here cells are made in registers
constexpr int64_t kRowBlock = 512;           // rows of x per task: their sums are 128 KiB of L2
constexpr int64_t kStreamBytes = 512 << 10;  // of weight per task with few rows
constexpr int64_t kLine = 16;                // words of a cache line

struct Panels {
  const Cell* words = nullptr;
  const char* scale = nullptr;    // [panels, groups, kPanel] or null
  int32_t scale_type = kFloat32;
  const uint8_t* zero = nullptr;  // [panels, groups, kPanel] or null
  int64_t k = 0;                  // filled up to a multiple of kUnit
  int64_t group = 0, groups = 1;  // k per scale; how many
};

// A run of k within one block and one group, and what belongs to it.
struct Piece {
  int64_t begin, end;
  const float* scale;  // or null
  const Cell* zeros;   // or null
};

// The pieces of one block of a panel, with scales as float32 and zero points as `expand` takes them.
struct Pieces {
  Piece at[kBlock / kUnit];
  int64_t count = 0;
  alignas(64) float scales[kBlock / kUnit][kPanel];
  alignas(64) Cell zeros[kBlock / kUnit][kPanel];

  template <class F>
  void read(const Panels& w, int64_t panel, int64_t begin) {
    const int64_t end = std::min(w.k, begin + kBlock);
    count = 0;
    while (begin < end) {
      const int64_t group = begin / w.group, row = (panel * w.groups + group) * kPanel;
      Piece& piece = at[count];
      piece = {begin, std::min(end, (group + 1) * w.group), nullptr, nullptr};
      if (w.scale) {
        float* to = scales[count];
        if (w.scale_type == kFloat32) widen(reinterpret_cast<const float*>(w.scale) + row, kPanel, to);
        else if (w.scale_type == kBFloat16) widen(reinterpret_cast<const bfloat16*>(w.scale) + row, kPanel, to);
        else widen(reinterpret_cast<const float16*>(w.scale) + row, kPanel, to);
        for (int64_t i = 0; i < kPanel; ++i) to[i] *= F::kFactor;
        piece.scale = to;
      }
      if (F::kZeros) {
        widen_zeros(w.zero + row, zeros[count]);
        piece.zeros = zeros[count];
      }
      begin = piece.end;
      ++count;
    }
  }
};

// Sums of one panel as float32, for rows [m0, m1) of x: then scales, bias and rounding.
template <class F, class A>
void finish_panel(const Product& p, const Panels& w, int64_t m0, int64_t m1, int64_t panel, Cell* sums) {
  for (int64_t m = 0; m < m1 - m0; ++m, sums += kPanel) {
    for (int64_t i = 0; i < kPanel; i += W) {
      vi sum = load_cells(sums + i);
#if defined(__AVX512VNNI__)
      // Behind the last row: 128 times the column, which is too much in every row.
      if constexpr (std::is_same_v<A, Int8Cells>)
        sum = float_cell(sum - load_cells(sums + (m1 - m0 - m) * kPanel + i));
      else
#endif
        if (!w.scale) sum = vi(vf(sum) * F::kFactor);
      store_cells(sums + i, sum);
    }
  }
  float* first = reinterpret_cast<float*>(sums - (m1 - m0) * kPanel);
  finish(p, m0, m1, panel * kPanel, std::min(p.n, (panel + 1) * kPanel), first, kPanel);
}

// All rows of x, one or two, and panels [first, last).
template <class F, class A>
void stream_panels(const Product& p, const Panels& w, const Rows<A>& x, int64_t first, int64_t last) {
  Pieces pieces;
  for (int64_t panel = first; panel < last; ++panel) {
    alignas(64) Cell sums[(kStreamRows + 1) * kPanel] = {};
    const Cell* words = w.words + panel * (w.k / F::kPerWord) * kPanel;
    for (int64_t block = 0; block < w.k; block += kBlock) {
      pieces.read<F>(w, panel, block);
      for (int64_t i = 0; i < pieces.count; ++i) {
        const Piece& piece = pieces.at[i];
        const Cell *cells = x.at(0, piece.begin), *from = words + piece.begin / F::kPerWord * kPanel;
        const int64_t count = (piece.end - piece.begin) / F::kPerWord;
        if (x.rows == 1) stream_tile<F, A, 1>(cells, x.stride, from, count, piece.zeros, sums, piece.scale);
        else if (x.rows == 2) stream_tile<F, A, 2>(cells, x.stride, from, count, piece.zeros, sums, piece.scale);
        else stream_tile<F, A, 3>(cells, x.stride, from, count, piece.zeros, sums, piece.scale);
      }
    }
    finish_panel<F, A>(p, w, 0, p.m, panel, sums);
  }
}

// Rows [m0, m1) of x and one panel, block by block.
template <class F, class A>
void multiply_panel(const Product& p, const Panels& w, const Rows<A>& x, int64_t m0, int64_t m1, int64_t panel) {
  struct SumsTag {};
  struct CellsTag {};
  constexpr bool direct = kCells<F, A> == 1 && !F::kZeros;  // words are cells
  const int64_t m = m1 - m0, extra = x.rows - p.m;
  Cell* sums = reinterpret_cast<Cell*>(scratch<SumsTag>((m + extra) * kPanel));
  Cell* made = direct ? nullptr : reinterpret_cast<Cell*>(scratch<CellsTag>(kBlock / A::kSteps * kPanel));
  std::fill(sums, sums + (m + extra) * kPanel, 0);
  const Cell* words = w.words + panel * (w.k / F::kPerWord) * kPanel;
  Pieces pieces;
  for (int64_t block = 0; block < w.k; block += kBlock) {
    pieces.read<F>(w, panel, block);
    const Cell* from = words + block / F::kPerWord * kPanel;
    if (!direct)
      for (int64_t i = 0; i < pieces.count; ++i) {
        const Piece& piece = pieces.at[i];
        const int64_t at = piece.begin - block;
        expand_block<F, A>(from + at / F::kPerWord * kPanel, (piece.end - piece.begin) / F::kPerWord, piece.zeros,
                           made + at / A::kSteps * kPanel);
      }
    const Cell* cells = direct ? from : made;
    // While this block is multiplied the next one is read: so many of its lines for each few rows.
    const int64_t lines = kBlock / F::kPerWord * kPanel / kLine, share = (lines * kTileRows + m - 1) / m;
    const Cell* next = from + lines * kLine;
    int64_t line = 0;
    const auto add = [&](int64_t first, int64_t rows, Cell* to) {
      for (int64_t i = 0; i < pieces.count; ++i) {
        const Piece& piece = pieces.at[i];
        tile_rows<A>(x.at(first, piece.begin), x.stride, rows, cells + (piece.begin - block) / A::kSteps * kPanel,
                     (piece.end - piece.begin) / A::kSteps, to, piece.scale);
      }
    };
    for (int64_t row = 0; row < m; row += kTileRows) {
      for (const int64_t end = std::min(lines, line + share); line < end; ++line) __builtin_prefetch(next + line * kLine, 0, 2);
      add(m0 + row, std::min<int64_t>(kTileRows, m - row), sums + row * kPanel);
    }
    if (extra) add(p.m, extra, sums + m * kPanel);
  }
  finish_panel<F, A>(p, w, m0, m1, panel, sums);
}

template <class F, class A>
void multiply(const Product& p, const Panels& w, const Rows<A>& x) {
  const int64_t panels = (p.n + kPanel - 1) / kPanel, bytes = w.k / F::kPerWord * kPanel * int64_t(sizeof(Cell));
  const int64_t threads = omp_get_max_threads();
  if (p.m <= kStreamRows) {
    const int64_t fair = panels / (4 * threads), step = std::max<int64_t>(1, std::min(fair, kStreamBytes / bytes));
    parallel_for((panels + step - 1) / step, panels * bytes, [&](int64_t task) {
      stream_panels<F, A>(p, w, x, task * step, std::min(panels, (task + 1) * step));
    });
    return;
  }
  // Fewer rows a task where panels alone would not keep all threads busy.
  int64_t rows = kRowBlock;
  while (rows > 8 * kTileRows && panels * ((p.m + rows - 1) / rows) < 4 * threads) rows /= 2;
  const int64_t row_blocks = (p.m + rows - 1) / rows;
  parallel_for(panels * row_blocks, panels * bytes * p.m, [&](int64_t task) {
    const int64_t m0 = task % row_blocks * rows;
    multiply_panel<F, A>(p, w, x, m0, std::min(p.m, m0 + rows), task / row_blocks);
  });
}

template <class F>
void multiply_by(Product& p, const Panels& w, const View& x, bool quantized) {
  if (quantized) {
#if defined(__AVX512VNNI__)
    if constexpr (std::is_same_v<F, Int8Words>) return multiply<F>(p, w, Rows<Int8Cells>(x, p, w.k, true));
#endif
    return multiply<F>(p, w, Rows<FloatCells>(x, p, w.k, true));
  }
#if defined(__AVX512BF16__)
  if (x.dtype == kBFloat16) return multiply<F>(p, w, Rows<BFloat16Cells>(x, p, w.k, false));
#endif
  multiply<F>(p, w, Rows<FloatCells>(x, p, w.k, false));
}

Panels open_panels(const View& w, AtenTensorHandle* scale, AtenTensorHandle* zero, int64_t rows, int64_t columns,
                   int64_t per_word, int64_t bytes, int64_t group) {
  Panels out;
  out.words = w.as<Cell>();
  out.k = (columns + kUnit - 1) / kUnit * kUnit;
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  require(w.dim == 4 && w.contiguous() && w.sizes[0] == panels && w.sizes[1] == out.k / per_word &&
              w.sizes[2] == kPanel && w.sizes[3] == bytes,
          "the weight is not the packed one of these rows and columns");
  require(group >= 0 && group % kUnit == 0, "the group must be a multiple of 8 columns");
  out.group = group ? group : std::max<int64_t>(out.k, 1);
  out.groups = std::max<int64_t>(1, (out.k + out.group - 1) / out.group);
  const auto fits = [&](const View& v) {
    return v.dim == 3 && v.contiguous() && v.sizes[0] == panels && v.sizes[1] == out.groups && v.sizes[2] == kPanel;
  };
  if (scale) {
    const View view(*scale);
    require(view.dtype == kFloat32 || view.dtype == kBFloat16 || view.dtype == kFloat16, "the scale must be floating point");
    require(fits(view), "the scale is not the packed one of this weight");
    out.scale = view.data;
    out.scale_type = view.dtype;
  }
  if (zero) {
    const View view(*zero);
    require(view.dtype == kUInt8 && fits(view), "the zero points are not the packed ones of this weight");
    out.zero = view.as<uint8_t>();
  }
  return out;
}

void linear_packed(AtenTensorHandle x_handle, AtenTensorHandle w_handle, AtenTensorHandle* scale,
                   AtenTensorHandle* zero, AtenTensorHandle* bias, int64_t rows, const char* format, int64_t group,
                   const char* activations, AtenTensorHandle* ret) {
  const auto is = [&](const char* name) { return !std::strcmp(format, name); };
  const View x(x_handle), w(w_handle);
  require(is("bfloat16") || is("int8") || is("int4"), "the format must be bfloat16, int8 or int4");
  require(w.dtype == (is("bfloat16") ? kBFloat16 : is("int8") ? kInt8 : kUInt8), "the weight's dtype is not the format's");
  require(!*activations || !std::strcmp(activations, "int8"), "activations must be \"\" or int8");
  require(is("bfloat16") == !scale && (is("int4") || !zero), "scales and zero points are not the format's");
  require(x.dim >= 1, "x must be [..., k]");
  const int64_t per_word = is("bfloat16") ? 2 : is("int8") ? 4 : 8;
  Panels panels = open_panels(w, scale, zero, rows, x.sizes[x.dim - 1], per_word, is("bfloat16") ? 2 : 4, group);
  Product p = open_product(x, rows, x.sizes[x.dim - 1], bias, ret);
  if (p.m == 0 || p.n == 0) return;
  if (scale && panels.groups == 1 && panels.scale_type == kFloat32) {
    // One scale a row comes last, as in the reference.
    p.scale = reinterpret_cast<const float*>(panels.scale);
    panels.scale = nullptr;
  }
  const bool quantized = *activations;
  require(!quantized || (is("int8") && !panels.scale && panels.k <= 65536),
          "int8 activations take int8 weights with a scale per row and at most 65,536 columns");
  if (is("bfloat16")) multiply_by<BFloat16Words>(p, panels, x, quantized);
  else if (is("int8")) multiply_by<Int8Words>(p, panels, x, quantized);
  else if (zero) multiply_by<Int4Words<true>>(p, panels, x, quantized);
  else multiply_by<Int4Words<false>>(p, panels, x, quantized);
}

}  // namespace
}  // namespace ingot

extern "C" INGOT_API AOTITorchError aoti_torch_cpu_linear_packed(AtenTensorHandle x, AtenTensorHandle w,
                                                                 AtenTensorHandle* scale, AtenTensorHandle* zero,
                                                                 AtenTensorHandle* bias, int64_t rows,
                                                                 const char* format, int64_t group,
                                                                 const char* activations, AtenTensorHandle* ret) {
  return ingot::guarded("linear_packed", [&] {
    ingot::linear_packed(x, w, scale, zero, bias, rows, format, group, activations, ret);
  });
}
