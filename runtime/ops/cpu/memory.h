// Memory behind the shim's tensors. Engines allocate and free the same buffers at every step, so freed blocks are kept
// by size and handed out again; large ones ask for huge pages.
#pragma once

#include <cstdint>
#include <memory>

namespace ingot {

struct Storage {
  void* data = nullptr;
  int64_t bytes = 0;
  int64_t reserved = 0;  // size of the block in the cache of freed ones; 0: the memory is the caller's
  Storage(void* data, int64_t bytes, int64_t reserved) : data(data), bytes(bytes), reserved(reserved) {}
  Storage(const Storage&) = delete;
  ~Storage();
};

// 64-byte aligned and uninitialized; throws std::bad_alloc.
std::shared_ptr<Storage> allocate(int64_t bytes);

// Memory that outlives the tensor by the caller's promise.
std::shared_ptr<Storage> borrow(void* data, int64_t bytes);

// Bytes per element of a c10::ScalarType; 0 if it is not one that engines use.
int64_t element_size(int32_t dtype);

}  // namespace ingot
