// How the kernels are started.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#include "dispatch.h"

// libtorch's header declares it only where torch's own sources are built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace sru {

// Small blocks, so that few columns still reach every multiprocessor.
constexpr int kBlock = 64;

// Blocks that a multiprocessor must have room for: a limit of 168 registers for a thread, or 255 where flags take some.
template <bool Flagged>
constexpr int kBlocks = Flagged ? 4 : 6;

// A warp of 32 threads for each of a multiprocessor's four schedulers.
constexpr int64_t kEnoughThreads = 32 * 4;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "SRU's recurrence on the GPU: ", what, " failed: ", cudaGetErrorString(error),
                  " (", cudaGetErrorName(error), ").");
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(found, "SRU's recurrence on the GPU: torch did not tell the current stream.");
  return static_cast<cudaStream_t>(stream);
}

inline int64_t enough_threads(int32_t device) {
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking for the device");
  return multiprocessors * kEnoughThreads;
}

// `kernel` with a thread for each of `count` columns, if there are any.
template <typename P>
void launch(void (*kernel)(P, int64_t), const P& problem, int64_t count, cudaStream_t stream, const char* what) {
  if (count == 0) return;
  const int64_t blocks = (count + kBlock - 1) / kBlock, most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(blocks <= most && problem.length <= most, "SRU's recurrence on the GPU: the tensors are too large.");
  kernel<<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(problem, count);
  check(cudaGetLastError(), what);
}

__device__ __forceinline__ int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; }

}  // namespace sru
