// The allocator behind the shim's tensors: see memory.h.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include "tensor.h"

namespace ingot {
namespace {

constexpr int64_t kHugeBytes = 4 << 20;

struct Cache {
  std::mutex lock;
  std::unordered_map<int64_t, std::vector<void*>> free_blocks;  // by reserved size
};

// Never destroyed: engines may give tensors back while the process is already leaving.
Cache& cache() {
  static Cache* instance = new Cache;
  return *instance;
}

}  // namespace

std::shared_ptr<Storage> allocate(int64_t bytes) {
  const int64_t unit = bytes >= kHugeBytes ? 2 << 20 : 64;
  const int64_t reserved = std::max(unit, (bytes + unit - 1) / unit * unit);
  {
    std::lock_guard<std::mutex> guard(cache().lock);
    auto& blocks = cache().free_blocks[reserved];
    if (!blocks.empty()) {
      void* data = blocks.back();
      blocks.pop_back();
      return std::make_shared<Storage>(data, bytes, reserved);
    }
  }
  void* data = std::aligned_alloc(size_t(unit), size_t(reserved));
  if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugeBytes) madvise(data, size_t(reserved), MADV_HUGEPAGE);  // a hint: failure costs nothing
#endif
  return std::make_shared<Storage>(data, bytes, reserved);
}

std::shared_ptr<Storage> borrow(void* data, int64_t bytes) { return std::make_shared<Storage>(data, bytes, 0); }

Storage::~Storage() {
  if (reserved == 0) return;
  std::lock_guard<std::mutex> guard(cache().lock);
  cache().free_blocks[reserved].push_back(data);
}

int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case kUInt8: case kInt8: case kBool: case kFloat8E5M2: case kFloat8E4M3: return 1;
    case kInt16: case kUInt16: case kFloat16: case kBFloat16: return 2;
    case kInt32: case kUInt32: case kFloat32: return 4;
    case kInt64: case kUInt64: case kFloat64: return 8;
    default: return 0;
  }
}

}  // namespace ingot

// Gives freed blocks back to the system, for instance after the last engine of an artifact is closed.
extern "C" INGOT_API void ingot_release_memory() {
  std::lock_guard<std::mutex> guard(ingot::cache().lock);
  for (auto& [size, blocks] : ingot::cache().free_blocks) {
    for (void* block : blocks) std::free(block);
    blocks.clear();
  }
}
