// How kernels are started on torch's current stream.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

// libtorch's header declares it only where torch's own sources are built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace hfe {

inline void check(cudaError_t error, const char* op, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, op, " on the GPU: ", what, " failed: ", cudaGetErrorString(error), " (",
                  cudaGetErrorName(error), ").");
}

inline cudaStream_t current_stream(int32_t device, const char* op) {
  void* stream = nullptr;
  const bool found = aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(found, op, " on the GPU: torch did not tell the current stream.");
  return static_cast<cudaStream_t>(stream);
}

inline int64_t multiprocessors_of(int32_t device, const char* op) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op, "asking for the device");
  return count;
}

// `kernel` with a thread for each of `count` items in blocks of `Block`, if there are any.
template <int Block, typename Params>
void launch(void (*kernel)(Params, int64_t), const Params& params, int64_t count, cudaStream_t stream, const char* op,
            const char* what) {
  if (count == 0) return;
  const int64_t blocks = (count + Block - 1) / Block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), op, " on the GPU: the tensors are too large.");
  kernel<<<static_cast<unsigned>(blocks), Block, 0, stream>>>(params, count);
  check(cudaGetLastError(), op, what);
}

template <int Block>
__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * Block + threadIdx.x;
}

}  // namespace hfe
