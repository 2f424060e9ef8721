// One C call per step: hands an engine its inputs, runs it, and copies what it returns into the caller's tensors.
// Works with either host of the tensor functions (shim.cpp or libtorch), and is where ops leave their error messages.
#include <cstdio>
#include <string>
#include <vector>

#include "tensor.h"

namespace ingot {
namespace {
thread_local std::string last_error;
}

void report_error(const char* op, const char* message) {
  last_error = std::string(op) + ": " + message;
  std::fprintf(stderr, "ingot: %s\n", last_error.c_str());
}
}  // namespace ingot

// AOTInductorModelContainerRun or ...RunSingleThreaded, as found in the engine's shared object.
using RunFunction = int32_t (*)(void* container, AtenTensorHandle* inputs, size_t num_inputs, AtenTensorHandle* outputs,
                                size_t num_outputs, void* stream, void* proxy_executor);

#ifndef INGOT_KERNELS_ID
#define INGOT_KERNELS_ID ""
#endif
// Which sources and flags this library was compiled from: a process can hold only one version.
extern "C" INGOT_API const char* ingot_kernels_id() { return INGOT_KERNELS_ID; }

// The last message of this thread's ops; empty if none failed. Valid until the next failure on this thread.
extern "C" INGOT_API const char* ingot_last_error() { return ingot::last_error.c_str(); }

// Runs once. `inputs` stay the caller's (the engine consumes handles, so it is given fresh ones); `outputs` are tensors
// of the caller whose memory receives the results: same sizes and dtype as the engine's. 0 is success.
extern "C" INGOT_API int32_t ingot_run(void* container, RunFunction run, int64_t n_inputs, const AtenTensorHandle* inputs,
                                       int64_t n_outputs, const AtenTensorHandle* outputs) {
  return ingot::guarded("run", [&] {
    std::vector<AtenTensorHandle> given(size_t(n_inputs), nullptr), made(size_t(n_outputs), nullptr);
    for (int64_t i = 0; i < n_inputs; ++i) {
      ingot::require(aoti_torch_new_tensor_handle(inputs[i], &given[i]) == 0, "an input handle is not valid");
    }
    const int32_t status = run(container, given.data(), given.size(), made.data(), made.size(), nullptr, nullptr);
    int32_t copied = 0;
    for (int64_t i = 0; i < n_outputs; ++i) {
      if (status == 0) copied |= aoti_torch_copy_(outputs[i], made[i], 0);
      if (made[i]) aoti_torch_delete_tensor_object(made[i]);
    }
    ingot::require(status == 0, "the engine failed");
    ingot::require(copied == 0, "an output does not have the size or dtype that the caller expects");
  });
}
