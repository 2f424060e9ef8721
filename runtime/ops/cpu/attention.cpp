// paged_attention: causal attention of a few or many queries over a paged KV cache.
//
// Query heads that share a KV head are rows of one small matrix, so each key and value is read once for all of them, and
// only blocks that hold visible positions are touched. Prefill cuts the queries into tiles. Decode cuts the context into
// spans of 256 keys at fixed positions, which run in parallel and are merged in order. So a query's result does not
// depend on its batch, on the other queries of its chunk, or on the number of threads; only decode and prefill may
// differ by rounding.
#include "attention_decode.h"

namespace ingot {
namespace {

constexpr int64_t kTileRows = 64;  // query rows per task in prefill: they share every key tile that is widened
constexpr int64_t kFewRows = 16;   // up to here, and for one token a row, the context is cut instead
constexpr int64_t kSpan = 256;
constexpr int64_t kMaxTogether = 8;  // KV heads per task of decode

struct KeptTag {};
struct TileTag {};
struct PartialTag {};
struct SinkTag {};

template <class O>
void write_as(const Call& c, int64_t index, const float* acc, float factor) {
  O* out = static_cast<O*>(c.out) + index * c.v_dim;
  for (int64_t d = 0; d < c.v_dim; ++d) from_float(factor == 0 ? 0.0f : acc[d] * factor, out + d);
}

// The result of one query: acc / (sum + sink), zero where nothing was visible.
void write_row(const Call& c, int64_t b, int64_t t, int64_t head, const float* acc, float top, float sum) {
  float factor = 0;
  if (top != -kInfinity || sum != 0) {
    const float highest = c.sinks ? std::max(top, c.sinks[head]) : top;
    const float shrink = highest == top ? 1.0f : std::exp(top - highest);
    factor = shrink / (sum * shrink + (c.sinks ? std::exp(c.sinks[head] - highest) : 0.0f));
  }
  const int64_t index = (b * c.length + t) * c.heads + head;
  if (c.q.dtype == kFloat32) write_as<float>(c, index, acc, factor);
  else if (c.q.dtype == kBFloat16) write_as<bfloat16>(c, index, acc, factor);
  else write_as<float16>(c, index, acc, factor);
}

std::pair<int64_t, int64_t> union_of_rows(const Rows& rows) {
  int64_t from = std::numeric_limits<int64_t>::max(), to = 0;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (rows.first[r] >= rows.last[r]) continue;
    from = std::min(from, rows.first[r]);
    to = std::max(to, rows.last[r]);
  }
  return {std::min(from, to), to};
}

// Decode: every (batch entry, KV head, span) leaves a partial softmax; partials are merged in the order of the spans.
// A task takes one span for as many KV heads as leaves all threads something to do, since together they read memory in
// one run.
template <class T>
void run_spans(const Call& c, int64_t longest, int64_t bytes) {
  const int64_t rows_each = c.length * c.groups, spans = std::max<int64_t>(1, (longest + kSpan - 1) / kSpan);
  const int64_t stride = c.v_pad + 2;  // acc, top, sum
  float* partials = scratch<PartialTag>(c.batch * c.kv_heads * spans * rows_each * stride);
  int64_t together = std::min<int64_t>(c.kv_heads, kMaxTogether);
  while (together > 1 && c.batch * spans * (c.kv_heads / together) < 2 * omp_get_max_threads()) together /= 2;
  const int64_t parts = (c.kv_heads + together - 1) / together;
  parallel_for(c.batch * spans * parts, bytes, [&](int64_t task) {
    const int64_t b = task / parts / spans, span = task / parts % spans;
    const int64_t h0 = task % parts * together, h1 = std::min(c.kv_heads, h0 + together), heads = h1 - h0;
    float* kept = scratch<KeptTag>(heads * kept_floats(c, rows_each));
    float* tile = scratch<TileTag>(heads * tile_floats(c, rows_each));
    Rows rows[kMaxTogether];
    for (int64_t h = 0; h < heads; ++h) {
      load_rows(c, b, h0 + h, 0, c.length, rows[h], kept + h * kept_floats(c, rows_each),
                tile + h * tile_floats(c, rows_each));
    }
    const auto [first, last] = union_of_rows(rows[0]);
    const int64_t from = std::max(first, span * kSpan), to = std::min(last, (span + 1) * kSpan);
    for (int64_t base = from / kKeys * kKeys; base < to; base += kKeys) {
      if constexpr (!kScaled<T>) {
        if (one_token(c)) {
          attend_together<T>(c, b, h0, heads, rows, base, from, to);
          continue;
        }
      }
      for (int64_t h = h0; h < h1; ++h) attend<T>(c, b, h, rows[h - h0], base, from, to);
    }
    for (int64_t h = h0; h < h1; ++h) {
      const Rows& done = rows[h - h0];
      float* part = partials + ((b * c.kv_heads + h) * spans + span) * rows_each * stride;
      for (int64_t r = 0; r < rows_each; ++r, part += stride) {
        std::copy(done.acc + r * c.v_pad, done.acc + (r + 1) * c.v_pad, part);
        part[c.v_pad] = done.top[r];
        part[c.v_pad + 1] = done.sum[r];
      }
    }
  });
  parallel_for(c.batch * c.kv_heads, c.batch * c.kv_heads * spans * rows_each * stride * 4, [&](int64_t task) {
    for (int64_t r = 0; r < rows_each; ++r) {
      float* merged = partials + (task * spans * rows_each + r) * stride;
      for (int64_t span = 1; span < spans; ++span) {
        const float* part = merged + span * rows_each * stride;
        if (part[c.v_pad + 1] == 0 && part[c.v_pad] == -kInfinity) continue;
        const float top = std::max(merged[c.v_pad], part[c.v_pad]);
        const float mine = std::exp(merged[c.v_pad] - top), theirs = std::exp(part[c.v_pad] - top);
        for (int64_t d = 0; d < c.v_dim; ++d) merged[d] = merged[d] * mine + part[d] * theirs;
        merged[c.v_pad + 1] = merged[c.v_pad + 1] * mine + part[c.v_pad + 1] * theirs;
        merged[c.v_pad] = top;
      }
      const int64_t head = task % c.kv_heads * c.groups + r % c.groups;
      write_row(c, task / c.kv_heads, r / c.groups, head, merged, merged[c.v_pad], merged[c.v_pad + 1]);
    }
  });
}

// Prefill: every (batch entry, KV head, tile of queries) runs over all its keys.
template <class T>
void run_tiles(const Call& c, int64_t bytes) {
  const int64_t step = std::max<int64_t>(1, kTileRows / c.groups), tiles = (c.length + step - 1) / step;
  parallel_for(c.batch * c.kv_heads * tiles, bytes, [&](int64_t task) {
    // Late queries see most and go first, so that no thread is left alone with them at the end.
    const int64_t tile = tiles - 1 - task / (c.batch * c.kv_heads);
    const int64_t b = task % (c.batch * c.kv_heads) / c.kv_heads, kv_head = task % c.kv_heads;
    const int64_t t0 = tile * step, t1 = std::min(c.length, t0 + step);
    Rows rows;
    const int64_t count = (t1 - t0) * c.groups;
    load_rows(c, b, kv_head, t0, t1, rows, scratch<KeptTag>(kept_floats(c, count)), scratch<TileTag>(tile_floats(c, count)));
    const auto [from, to] = union_of_rows(rows);
    for (int64_t base = from / kKeys * kKeys; base < to; base += kKeys) attend<T>(c, b, kv_head, rows, base, from, to);
    for (int64_t r = 0; r < rows.count; ++r) {
      write_row(c, b, t0 + r / c.groups, kv_head * c.groups + r % c.groups, rows.acc + r * c.v_pad, rows.top[r],
                rows.sum[r]);
    }
  });
}

template <class T>
void dispatch(const Call& c) {
  int64_t seen = 0, longest = 0;
  for (int64_t b = 0; b < c.batch; ++b) {
    int64_t last = 0, first = c.capacity;
    for (int64_t t = 0; t < c.length; ++t) {
      const auto [from, to] = c.visible(c.position(b, t));
      if (from >= to) continue;
      first = std::min(first, from);
      last = std::max(last, to);
      seen += to - from;
    }
    longest = std::max(longest, last);
    for (int64_t i = first / c.block_size; i * c.block_size < last; ++i) {
      require(c.block(b, i) >= 0 && c.block(b, i) < std::min(c.k.sizes[0], c.v.sizes[0]), "a block table entry is not a block");
    }
  }
  const bool few = c.length == 1 || c.length * c.groups <= kFewRows;
  const int64_t bytes = seen * c.kv_heads * (c.dim + c.v_dim) * int64_t(sizeof(T)) * std::max<int64_t>(1, c.groups / 4);
  if (few) run_spans<T>(c, longest, bytes);
  else run_tiles<T>(c, bytes);
}

const float* float_sinks(const View& sinks, int64_t heads) {
  require(sinks.dim == 1 && sinks.sizes[0] == heads, "sinks must be [heads]");
  float* out = scratch<SinkTag>(heads);
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t at = i * sinks.strides[0];
    if (sinks.dtype == kFloat32) out[i] = sinks.as<float>()[at];
    else if (sinks.dtype == kBFloat16) out[i] = to_float(sinks.as<bfloat16>()[at]);
    else out[i] = to_float(sinks.as<float16>()[at]);
  }
  return out;
}

const float* scales(AtenTensorHandle* handle, const View& cache) {
  require(handle != nullptr, "a quantized cache needs its scales");
  const View view(*handle);
  require(view.dtype == kFloat32 && view.dim == 3 && view.contiguous() && std::equal(view.sizes, view.sizes + 3, cache.sizes),
          "the scales must be float32 [blocks, block_size, kv_heads]");
  return view.as<float>();
}

bool floating(int32_t dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

void paged_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle tables,
                     AtenTensorHandle positions, double scale, int64_t window, double softcap, AtenTensorHandle* sinks,
                     AtenTensorHandle* k_scale, AtenTensorHandle* v_scale, AtenTensorHandle* ret) {
  Call c{View(q), View(k), View(v), View(tables), View(positions)};
  require(c.q.dim == 4 && c.k.dim == 4 && c.v.dim == 4 && c.tables.dim == 2 && c.positions.dim == 2,
          "q and the caches must have 4 dimensions, block_tables and positions 2");
  const bool scaled = c.k.dtype == kInt8 || c.k.dtype == kFloat8E4M3;
  require(floating(c.q.dtype) && (scaled || floating(c.k.dtype)) && c.k.dtype == c.v.dtype,
          "q must be floating point, the caches too, or both int8 or float8_e4m3fn");
  require(c.tables.dtype == kInt32 && c.positions.dtype == kInt64, "block_tables must be int32, positions int64");
  c.batch = c.q.sizes[0];
  c.heads = c.q.sizes[1];
  c.length = c.q.sizes[2];
  c.dim = c.q.sizes[3];
  c.block_size = c.k.sizes[1];
  c.kv_heads = c.k.sizes[2];
  c.v_dim = c.v.sizes[3];
  c.v_pad = (c.v_dim + W - 1) / W * W;
  c.capacity = c.tables.sizes[1] * c.block_size;
  require(c.k.sizes[3] == c.dim && c.v.sizes[1] == c.block_size && c.v.sizes[2] == c.kv_heads, "the caches do not fit q");
  require(c.kv_heads > 0 && c.heads % c.kv_heads == 0, "the heads are not a multiple of the KV heads");
  c.groups = c.heads / c.kv_heads;
  require(c.groups <= kMaxRows, "more than 128 query heads share a KV head");
  require(c.tables.sizes[0] == c.batch && c.positions.sizes[0] == c.batch && c.positions.sizes[1] == c.length,
          "block_tables and positions do not fit q");
  require((c.q.strides[3] == 1 || c.dim == 1) && (c.k.strides[3] == 1 || c.dim == 1) && (c.v.strides[3] == 1 || c.v_dim == 1),
          "the last dimension of q and of the caches must be contiguous");
  if (scaled) {
    c.k_scale = scales(k_scale, c.k);
    c.v_scale = scales(v_scale, c.v);
  } else {
    require(!k_scale && !v_scale, "only a quantized cache has scales");
  }
  c.scale = float(scale);
  c.softcap = float(softcap);
  c.window = window;
  c.sinks = sinks ? float_sinks(View(*sinks), c.heads) : nullptr;
  const int64_t sizes[4] = {c.batch, c.length, c.heads, c.v_dim};
  *ret = empty(4, sizes, c.q.dtype);
  c.out = View(*ret).data;
  if (c.k.dtype == kFloat32) dispatch<float>(c);
  else if (c.k.dtype == kBFloat16) dispatch<bfloat16>(c);
  else if (c.k.dtype == kInt8) dispatch<int8_t>(c);
  else if (c.k.dtype == kFloat8E4M3) dispatch<float8>(c);
  else dispatch<float16>(c);
}

}  // namespace
}  // namespace ingot

extern "C" INGOT_API AOTITorchError aoti_torch_cpu_paged_attention(
    AtenTensorHandle q, AtenTensorHandle k_cache, AtenTensorHandle v_cache, AtenTensorHandle block_tables,
    AtenTensorHandle positions, double scale, int64_t window, double softcap, AtenTensorHandle* sinks,
    AtenTensorHandle* k_scale, AtenTensorHandle* v_scale, AtenTensorHandle* ret) {
  return ingot::guarded("paged_attention", [&] {
    ingot::paged_attention(q, k_cache, v_cache, block_tables, positions, scale, window, softcap, sinks, k_scale, v_scale,
                           ret);
  });
}
