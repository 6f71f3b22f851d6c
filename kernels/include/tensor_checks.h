// Checks of the tensors that an op is given, and views of them, against libtorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "tensor_view.h"

namespace hfe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline std::string text_of(const int64_t* sizes, size_t count) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, not ",
                             torch::headeronly::toString(tensor.scalar_type()), ".");
  }
}

inline void check_shape(const Tensor& tensor, const Shape& shape, const char* name) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
                  " must have shape ", text_of(shape.data(), shape.size()), ", not ",
                  text_of(sizes.data(), sizes.size()), ".");
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on the device of ", like_name, ".");
}

// Whether rows can be read and written directly. A tensor without elements counts, whatever its strides say.
inline bool has_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1;
}

inline TensorView view_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(has_contiguous_rows(tensor), name, " must be contiguous in its last dimension.");
  TensorView view;
  view.data = tensor.data_ptr();
  view.batch_stride = tensor.stride(0);
  view.step_stride = tensor.stride(1);
  view.part_stride = tensor.dim() == 4 ? tensor.stride(2) : 0;
  view.dtype = dtype_of(tensor, name);
  return view;
}

inline BoolView bool_view_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Bool, name, " must be boolean.");
  return {static_cast<const bool*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

}  // namespace hfe
