// Threads and per-thread scratch memory. Engines and kernels share one OpenMP pool, so no thread is ever created here.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace ingot {

// Entering a parallel region costs about 1-3 us with warm threads; below this much memory to read (or as much
// arithmetic) one core is done sooner.
constexpr int64_t kSerialBytes = 96 * 1024;

// Runs body(task) for every task; dynamic, so that a thread that lost its core does not hold up the others.
template <class F>
inline void parallel_for(int64_t tasks, int64_t bytes, F&& body) {
  if (tasks <= 1 || bytes < kSerialBytes || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// Grow-only, 64-byte aligned memory that a thread keeps for its next call; `Tag` tells buffers in use together apart.
template <class Tag>
inline float* scratch(int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = 0;
    const int64_t rounded = (std::max<int64_t>(floats, 1024) + 15) / 16 * 16;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, size_t(rounded) * sizeof(float)));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = rounded;
  }
  return buffer.data;
}

}  // namespace ingot
