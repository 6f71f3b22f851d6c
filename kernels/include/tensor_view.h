// Tensors as kernels see them: pointers, strides and dtypes, without any tensor library.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace hfe {

enum class DType : int32_t { float32, float64, bfloat16, float16 };

HFE_INLINE int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A tensor (batch, length, [parts,] width) whose last dimension is contiguous; strides in elements.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t step_stride = 0;
  int64_t part_stride = 0;
  DType dtype = DType::float32;

  HFE_INLINE explicit operator bool() const { return data != nullptr; }
};

// A boolean tensor (batch, length).
struct BoolView {
  const bool* data = nullptr;
  int64_t batch_stride = 0;
  int64_t step_stride = 0;
};

}  // namespace hfe
