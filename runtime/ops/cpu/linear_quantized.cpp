// linear_quantized: x [..., k] times the transpose of a quantized weight [n, k]. Checks the operands, quantizes x's rows
// where that is asked for, and hands over to the format's own kernel.
#include <cstring>

#include "linear.h"
#include "parallel.h"
#include "quantize_rows.h"

namespace ingot {
namespace {

QuantizedWeight open_weight(const View& w, const View& scale, AtenTensorHandle* zero, bool packed, bool mxfp4,
                            const int64_t* group, int64_t group_size, int64_t* k) {
  require(w.dim == 2 && w.contiguous(), "the weight must be [n, k] and contiguous");
  require(group_size == 2 && group[0] > 0 && group[1] > 0, "group must be rows and columns per scale");
  *k = w.sizes[1] * (packed ? 2 : 1);
  QuantizedWeight out;
  out.values = w.data;
  out.rows = group[0];
  out.columns = group[1];
  out.blocks = (*k + out.columns - 1) / out.columns;
  const int64_t high = (w.sizes[0] + out.rows - 1) / out.rows;
  const auto fits = [&](const View& v) {
    return v.dim == 2 && v.contiguous() && v.sizes[0] == high && v.sizes[1] == out.blocks;
  };
  require(fits(scale), "the scale must be one number per group");
  const bool number = scale.dtype == kFloat32 || scale.dtype == kBFloat16 || scale.dtype == kFloat16;
  require(mxfp4 ? scale.dtype == kUInt8 : number, "the scale's dtype does not belong to the format");
  out.scale = scale.data;
  out.scale_type = scale.dtype;
  if (zero) {
    const View view(*zero);
    require(packed && !mxfp4 && view.dtype == kUInt8 && fits(view), "only int4 has zero points: uint8, one per group");
    out.zero = view.as<uint8_t>();
  }
  return out;
}

void quantize_input(Product& p, const char* activations) {
  if (!*activations) return;
  const bool fp8 = !std::strcmp(activations, "fp8");
  require(fp8 || !std::strcmp(activations, "int8"), "activations must be \"\", int8 or fp8");
  struct RowsTag {};
  struct ScalesTag {};
  float *rows = scratch<RowsTag>(p.m * p.k), *scales = scratch<ScalesTag>(p.m);
  parallel_for(p.m, p.m * p.k * 16,
               [&](int64_t row) { scales[row] = quantize_row(p.x + row * p.k, p.k, fp8, rows + row * p.k); });
  p.x = rows;
  p.row_scale = scales;
}

void linear_quantized(AtenTensorHandle x_handle, AtenTensorHandle w_handle, AtenTensorHandle scale_handle,
                      AtenTensorHandle* zero, AtenTensorHandle* bias, const char* format, const int64_t* group,
                      int64_t group_size, const char* activations, AtenTensorHandle* ret) {
  const auto is = [&](const char* name) { return !std::strcmp(format, name); };
  require(is("int8") || is("int4") || is("fp8") || is("mxfp4"), "the format must be int8, int4, fp8 or mxfp4");
  const View x(x_handle), w(w_handle), scale(scale_handle);
  require(w.dtype == (is("int8") ? kInt8 : is("fp8") ? kFloat8E4M3 : kUInt8), "the weight's dtype is not the format's");
  int64_t k = 0;
  const QuantizedWeight weight =
      open_weight(w, scale, zero, is("int4") || is("mxfp4"), is("mxfp4"), group, group_size, &k);
  Product p = open_product(x, w.sizes[0], k, bias, ret);
  if (p.m == 0 || p.n == 0) return;
  read_rows(x, p);
  quantize_input(p, activations);
  if (is("int8") && weight.blocks == 1 && weight.rows == 1 && scale.dtype == kFloat32) {
    p.scale = scale.as<float>();
    multiply_int8_channels(p, w.as<int8_t>());
  } else if (is("int8")) {
    multiply_int8(p, weight);
  } else if (is("int4")) {
    multiply_int4(p, weight);
  } else if (is("fp8")) {
    multiply_fp8(p, weight);
  } else {
    multiply_mxfp4(p, weight);
  }
}

}  // namespace
}  // namespace ingot

extern "C" INGOT_API AOTITorchError aoti_torch_cpu_linear_quantized(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle scale, AtenTensorHandle* zero, AtenTensorHandle* bias,
    const char* format, const int64_t* group, int64_t group_size, const char* activations, AtenTensorHandle* ret) {
  return ingot::guarded("linear_quantized", [&] {
    ingot::linear_quantized(x, w, scale, zero, bias, format, group, group_size, activations, ret);
  });
}
