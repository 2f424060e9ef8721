// Ingot's own implementation of the aoti_torch_* functions a compiled CPU engine calls, so that an artifact runs on a
// machine without torch: strided CPU tensors, the constants, and nothing else. Numbers equal torch's (c10::ScalarType,
// c10::DeviceType, c10::Layout), since engines keep some of them as literals. A function missing here is found when the
// engine is loaded (unresolved symbol), not in the middle of a run.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "memory.h"
#include "tensor.h"

namespace {

using namespace ingot;

constexpr int64_t kMaxDims = 16;

// A handle points to one of these. Views share the storage; its last owner gives the memory back.
struct Tensor {
  std::shared_ptr<Storage> storage;
  int64_t dim = 0, offset = 0;
  int32_t dtype = kFloat32;
  int64_t sizes[kMaxDims], strides[kMaxDims];

  char* data() const { return static_cast<char*>(storage->data) + offset * element_size(dtype); }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
    return n;
  }
};

Tensor* of(AtenTensorHandle handle) {
  require(handle != nullptr, "a tensor handle is null");
  return reinterpret_cast<Tensor*>(handle);
}

AtenTensorHandle give(std::unique_ptr<Tensor> tensor) { return reinterpret_cast<AtenTensorHandle>(tensor.release()); }

// Elements from the first to one past the last that sizes and strides can reach.
int64_t extent(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t last = 0;
  for (int64_t d = 0; d < dim; ++d) {
    require(sizes[d] >= 0 && strides[d] >= 0, "sizes and strides must not be negative");
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

std::unique_ptr<Tensor> shaped(int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype) {
  require(dim >= 0 && dim <= kMaxDims, "a tensor has more than 16 dimensions");
  require(element_size(dtype) > 0, "this dtype is not supported");
  auto tensor = std::make_unique<Tensor>();
  tensor->dim = dim;
  tensor->dtype = dtype;
  tensor->offset = offset;
  std::copy(sizes, sizes + dim, tensor->sizes);
  std::copy(strides, strides + dim, tensor->strides);
  return tensor;
}

std::unique_ptr<Tensor> fresh(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  auto tensor = shaped(dim, sizes, strides, 0, dtype);
  tensor->storage = allocate(extent(dim, sizes, strides) * element_size(dtype));
  return tensor;
}

// Element by element in row-major order, the innermost dimension in one go where both sides allow it.
void copy_elements(const Tensor& to, const Tensor& from, int64_t d, char* target, const char* source) {
  const int64_t bytes = element_size(to.dtype);
  if (d == to.dim) {
    std::memcpy(target, source, bytes);
    return;
  }
  const int64_t n = to.sizes[d], step = to.strides[d] * bytes, pace = from.strides[d] * bytes;
  if (d == to.dim - 1 && step == bytes && pace == bytes) {
    std::memcpy(target, source, n * bytes);
    return;
  }
  for (int64_t i = 0; i < n; ++i) copy_elements(to, from, d + 1, target + i * step, source + i * pace);
}

void copy_tensor(const Tensor& to, const Tensor& from) {
  require(to.dtype == from.dtype, "copy_: the dtypes differ");
  require(to.dim == from.dim && std::equal(to.sizes, to.sizes + to.dim, from.sizes), "copy_: the sizes differ");
  if (to.numel() > 0) copy_elements(to, from, 0, to.data(), from.data());
}

thread_local bool grad_mode = false;

}  // namespace

#define SHIM(name, ...) extern "C" INGOT_API AOTITorchError name(__VA_ARGS__)
#define CONSTANT(name, value) \
  extern "C" INGOT_API int32_t name() { return value; }

CONSTANT(aoti_torch_device_type_cpu, 0)
CONSTANT(aoti_torch_device_type_cuda, 1)
CONSTANT(aoti_torch_device_type_xpu, 12)
CONSTANT(aoti_torch_device_type_mps, 13)
CONSTANT(aoti_torch_device_type_meta, 14)
CONSTANT(aoti_torch_device_type_privateuse1, 20)
CONSTANT(aoti_torch_layout_strided, 0)
CONSTANT(aoti_torch_memory_format_contiguous_format, 0)
CONSTANT(aoti_torch_memory_format_preserve_format, 1)
CONSTANT(aoti_torch_dtype_uint8, kUInt8)
CONSTANT(aoti_torch_dtype_int8, kInt8)
CONSTANT(aoti_torch_dtype_int16, kInt16)
CONSTANT(aoti_torch_dtype_int32, kInt32)
CONSTANT(aoti_torch_dtype_int64, kInt64)
CONSTANT(aoti_torch_dtype_float16, kFloat16)
CONSTANT(aoti_torch_dtype_float32, kFloat32)
CONSTANT(aoti_torch_dtype_float64, kFloat64)
CONSTANT(aoti_torch_dtype_bool, kBool)
CONSTANT(aoti_torch_dtype_bfloat16, kBFloat16)
CONSTANT(aoti_torch_dtype_float8_e5m2, kFloat8E5M2)
CONSTANT(aoti_torch_dtype_float8_e4m3fn, kFloat8E4M3)
CONSTANT(aoti_torch_dtype_uint16, kUInt16)
CONSTANT(aoti_torch_dtype_uint32, kUInt32)
CONSTANT(aoti_torch_dtype_uint64, kUInt64)
extern "C" INGOT_API size_t aoti_torch_dtype_element_size(int32_t dtype) { return size_t(element_size(dtype)); }

extern "C" INGOT_API bool aoti_torch_grad_mode_is_enabled() { return grad_mode; }
extern "C" INGOT_API void aoti_torch_grad_mode_set_enabled(bool enabled) { grad_mode = enabled; }

// Thrown through the engine's frames, which turn it into an error code, as libtorch does.
extern "C" INGOT_API void aoti_torch_check(bool ok, const char* function, const char* file, uint32_t line, const char* message) {
  if (!ok) throw std::runtime_error(std::string(message) + " (" + function + ", " + file + ":" + std::to_string(line) + ")");
}
extern "C" INGOT_API void aoti_torch_warn(const char*, const char* file, uint32_t line, const char* message) {
  std::fprintf(stderr, "ingot: engine warning: %s (%s:%u)\n", message, file, line);
}

SHIM(aoti_torch_create_tensor_from_blob, void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
     int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t, AtenTensorHandle* ret) {
  return guarded(__func__, [&] {
    require(device_type == 0, "only CPU tensors exist here");
    auto tensor = shaped(ndim, sizes, strides, storage_offset, dtype);
    tensor->storage = borrow(data, (extent(ndim, sizes, strides) + storage_offset) * element_size(dtype));
    *ret = give(std::move(tensor));
  });
}
SHIM(aoti_torch_create_tensor_from_blob_v2, void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides,
     int64_t storage_offset, int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret,
     int32_t layout, const uint8_t*, int64_t) {
  if (layout != 0) return guarded(__func__, [] { throw std::invalid_argument("only strided tensors exist here"); });
  return aoti_torch_create_tensor_from_blob(data, ndim, sizes, strides, storage_offset, dtype, device_type, device_index, ret);
}
SHIM(aoti_torch_empty_strided, int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
     int32_t device_type, int32_t, AtenTensorHandle* ret) {
  return guarded(__func__, [&] {
    require(device_type == 0, "only CPU tensors exist here");
    *ret = give(fresh(ndim, sizes, strides, dtype));
  });
}
SHIM(aoti_torch__reinterpret_tensor, AtenTensorHandle self, int64_t ndim, const int64_t* sizes, const int64_t* strides,
     int64_t storage_offset, AtenTensorHandle* ret) {
  return guarded(__func__, [&] {
    // As in torch, the offset counts from the view's own start.
    auto view = shaped(ndim, sizes, strides, of(self)->offset + storage_offset, of(self)->dtype);
    view->storage = of(self)->storage;
    *ret = give(std::move(view));
  });
}
SHIM(aoti_torch_new_tensor_handle, AtenTensorHandle self, AtenTensorHandle* ret) {
  return guarded(__func__, [&] { *ret = give(std::make_unique<Tensor>(*of(self))); });
}
SHIM(aoti_torch_assign_tensors, AtenTensorHandle src, AtenTensorHandle dst) {
  return guarded(__func__, [&] { *of(dst) = *of(src); });
}
SHIM(aoti_torch_assign_tensors_out, AtenTensorHandle src, AtenTensorHandle* ret) {
  return aoti_torch_new_tensor_handle(src, ret);
}
SHIM(aoti_torch_delete_tensor_object, AtenTensorHandle self) {
  delete reinterpret_cast<Tensor*>(self);
  return 0;
}
SHIM(aoti_torch_clone, AtenTensorHandle self, AtenTensorHandle* ret) {
  return guarded(__func__, [&] {
    auto copy = fresh(of(self)->dim, of(self)->sizes, of(self)->strides, of(self)->dtype);
    copy_tensor(*copy, *of(self));
    *ret = give(std::move(copy));
  });
}
SHIM(aoti_torch_clone_preserve_strides, AtenTensorHandle self, AtenTensorHandle* ret) { return aoti_torch_clone(self, ret); }
SHIM(aoti_torch_copy_, AtenTensorHandle self, AtenTensorHandle src, int32_t) {
  return guarded(__func__, [&] { copy_tensor(*of(self), *of(src)); });
}
SHIM(aoti_torch_zero_, AtenTensorHandle self) {
  return guarded(__func__, [&] {
    const Tensor& t = *of(self);
    require(extent(t.dim, t.sizes, t.strides) == t.numel(), "zero_: only dense tensors");
    std::memset(t.data(), 0, size_t(t.numel() * element_size(t.dtype)));
  });
}

#define GETTER(name, type, value)                                                  \
  SHIM(name, AtenTensorHandle self, type* ret) {                                   \
    return guarded(__func__, [&] { const Tensor& t = *of(self); *ret = (value); }); \
  }
GETTER(aoti_torch_get_data_ptr, void*, t.data())
GETTER(aoti_torch_get_dim, int64_t, t.dim)
GETTER(aoti_torch_get_numel, int64_t, t.numel())
GETTER(aoti_torch_get_sizes, int64_t*, const_cast<int64_t*>(t.sizes))
GETTER(aoti_torch_get_strides, int64_t*, const_cast<int64_t*>(t.strides))
GETTER(aoti_torch_get_storage_offset, int64_t, t.offset)
GETTER(aoti_torch_get_storage_size, int64_t, t.storage->bytes)
GETTER(aoti_torch_get_dtype, int32_t, t.dtype)
GETTER(aoti_torch_get_device_type, int32_t, (void(t), 0))
GETTER(aoti_torch_get_device_index, int32_t, (void(t), 0))
GETTER(aoti_torch_get_layout, int32_t, (void(t), 0))

SHIM(aoti_torch_get_size, AtenTensorHandle self, int64_t d, int64_t* ret) {
  return guarded(__func__, [&] {
    require(d >= 0 && d < of(self)->dim, "there is no such dimension");
    *ret = of(self)->sizes[d];
  });
}
SHIM(aoti_torch_get_stride, AtenTensorHandle self, int64_t d, int64_t* ret) {
  return guarded(__func__, [&] {
    require(d >= 0 && d < of(self)->dim, "there is no such dimension");
    *ret = of(self)->strides[d];
  });
}
