// Work divided among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace decode_layer {

// Bytes that are worth a thread: some ten microseconds.
constexpr int64_t kGrainBytes = 1 << 18;

// Items that a thread gets at least, each of which reads `bytes`.
inline int64_t grain_of(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)); }

inline bool is_for_one_thread(int64_t count, int64_t bytes) {
  return count <= grain_of(bytes) || torch::stable::get_num_threads() == 1;
}

// `work(first, last)` for parts of `count` items, each of which reads `bytes`.
template <typename Work>
void for_each_part(int64_t count, int64_t bytes, const Work& work) {
  if (is_for_one_thread(count, bytes)) {
    work(int64_t(0), count);
  } else {
    torch::stable::parallel_for(0, count, grain_of(bytes), work);
  }
}

}  // namespace decode_layer
