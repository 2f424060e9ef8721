// The C surface that Ingot's CPU kernels are written against: the few aoti_torch_* functions an op needs, and a view.
// A compiled engine passes opaque tensor handles; who implements them (shim.cpp, or libtorch_cpu.so) is decided when
// the library is loaded. No torch header is included, so that a kernel compiles in seconds on a machine without torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#define INGOT_API __attribute__((visibility("default")))

extern "C" {
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using AOTITorchError = int32_t;  // 0 is success

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** sizes);      // borrowed
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** strides);  // borrowed, in elements
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* dtype);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle* ret);
AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle tensor, AtenTensorHandle* ret);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_copy_(AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking);
}

namespace ingot {

// Numbers of c10::ScalarType, which engines carry as constants of their own too.
enum DType : int32_t {
  kUInt8 = 0, kInt8 = 1, kInt16 = 2, kInt32 = 3, kInt64 = 4, kFloat16 = 5, kFloat32 = 6, kFloat64 = 7,
  kBool = 11, kBFloat16 = 15, kFloat8E5M2 = 23, kFloat8E4M3 = 24, kUInt16 = 27, kUInt32 = 28, kUInt64 = 29,
};

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// What a kernel sees of a tensor: borrowed from the handle, valid as long as it is.
struct View {
  char* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = kFloat32;

  explicit View(AtenTensorHandle handle) {
    require(handle != nullptr, "a tensor argument is null");
    void* pointer = nullptr;
    int64_t *size = nullptr, *stride = nullptr;
    const bool failed = aoti_torch_get_data_ptr(handle, &pointer) || aoti_torch_get_dim(handle, &dim) ||
                        aoti_torch_get_sizes(handle, &size) || aoti_torch_get_strides(handle, &stride) ||
                        aoti_torch_get_dtype(handle, &dtype);
    require(!failed, "a tensor handle could not be read");
    data = static_cast<char*>(pointer);
    sizes = size;
    strides = stride;
  }

  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }

  // Row-major without gaps; a dimension of size 1 may have any stride.
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

// A new uninitialized row-major CPU tensor; the caller of the op owns it.
inline AtenTensorHandle empty(int64_t ndim, const int64_t* sizes, int32_t dtype) {
  int64_t strides[16];
  require(ndim <= 16, "a tensor has more than 16 dimensions");
  for (int64_t d = ndim - 1, step = 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d];
  }
  AtenTensorHandle result = nullptr;
  require(aoti_torch_empty_strided(ndim, sizes, strides, dtype, 0, 0, &result) == 0, "an output could not be allocated");
  return result;
}

// Keeps the message for ingot_last_error and prints it: the engine's own error only says which call failed.
void report_error(const char* op, const char* message);

// The body of an op: C++ exceptions end here, since the caller is C.
template <class F>
AOTITorchError guarded(const char* op, F&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    report_error(op, error.what());
  } catch (...) {
    report_error(op, "unknown C++ exception");
  }
  return 1;
}

}  // namespace ingot
