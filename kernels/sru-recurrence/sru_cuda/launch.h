// How the kernels are started.
#pragma once

#include <cstdint>

#include "cuda_launch.h"
#include "dispatch.h"

namespace sru {

constexpr const char* kOp = "SRU's recurrence";

// Small blocks, so that few columns still reach every multiprocessor.
constexpr int kBlock = 64;

// Blocks that a multiprocessor must have room for: a limit of 168 registers for a thread, or 255 where flags take some.
template <bool Flagged>
constexpr int kBlocks = Flagged ? 4 : 6;

// A warp of 32 threads for each of a multiprocessor's four schedulers.
constexpr int64_t kEnoughThreads = 32 * 4;

inline int64_t enough_threads(int32_t device) { return hfe::multiprocessors_of(device, kOp) * kEnoughThreads; }

// `kernel` with a thread for each of `count` columns, if there are any.
template <typename Params>
void launch(void (*kernel)(Params, int64_t), const Params& params, int64_t count, cudaStream_t stream,
            const char* what) {
  STD_TORCH_CHECK(params.length <= std::numeric_limits<int32_t>::max(), kOp, " on the GPU: the tensors are too large.");
  hfe::launch<kBlock>(kernel, params, count, stream, kOp, what);
}

__device__ __forceinline__ int64_t thread_index() { return hfe::thread_index<kBlock>(); }

}  // namespace sru
