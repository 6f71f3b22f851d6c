// Which kernels a call runs: by the dtypes of rows, and by whether addresses allow wide accesses. Plain C++, so that tests
// can run it without a GPU.
#pragma once

#include <cstdint>

#include "items.h"

namespace sparse_ff {

// Whether `numbers` of each row can be read `V` at a time.
inline bool allows(const TensorView& view, int64_t numbers, int64_t V) {
  const int64_t size = hfe::size_of(view.dtype), access = V * size < 16 ? V * size : 16;
  const int64_t strides = (view.batch_stride | view.step_stride) * size;
  return numbers % V == 0 && (static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data)) | strides) % access == 0;
}

// `work.template run<T, V>()` for rows in `rows.dtype`; V makes 16 bytes where `wide` says so, and is else 1.
template <typename T, typename Work>
void by_width(bool wide, const Work& work) {
  constexpr int kWidest = static_cast<int>(16 / sizeof(T));
  wide ? work.template run<T, kWidest>() : work.template run<T, 1>();
}

template <typename Work>
void by_dtype(DType dtype, bool wide, const Work& work) {
  if (dtype == DType::float32) return by_width<float>(wide, work);
  if (dtype == DType::bfloat16) return by_width<BFloat16>(wide, work);
  by_width<Float16>(wide, work);
}

inline int64_t widest(const TensorView& rows) { return 16 / hfe::size_of(rows.dtype); }

inline bool wide_controller(const SparseFfParams& params) {
  const int64_t V = widest(params.controller_up);
  return allows(params.controller_down, params.width, V) && allows(params.x, params.width, V) &&
         allows(params.controller_up, params.rank, V) && allows(hidden_values(params), params.rank, V);
}

inline bool wide_rows(const SparseFfParams& params) {
  const int64_t V = widest(params.up);
  return allows(params.up, params.width, V) && allows(params.x, params.width, V);
}

}  // namespace sparse_ff
