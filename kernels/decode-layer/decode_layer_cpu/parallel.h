// Work divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace decode_layer {

// Bytes that are worth a thread: some ten microseconds.
constexpr int64_t kGrainBytes = 1 << 18;

// `work(first, last)` for parts of `count` items, each of which reads `bytes`.
template <typename Work>
void for_each_part(int64_t count, int64_t bytes, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes));
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    work(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain, work);
  }
}

}  // namespace decode_layer
