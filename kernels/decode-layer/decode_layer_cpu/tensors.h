// Weights as ops are given them: tensors, checked and read as matrices. Nothing is copied.
#pragma once

#include <optional>
#include <string>

#include "matrix.h"
#include "tensor_checks.h"

namespace decode_layer {

using hfe::check_shape;
using hfe::ScalarType;
using hfe::Shape;
using hfe::Tensor;
using hfe::text_of;

inline Format format_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Format::float32;
    case ScalarType::BFloat16: return Format::bfloat16;
    case ScalarType::Half: return Format::float16;
    case ScalarType::Char: return Format::int8;
    case ScalarType::Byte: return Format::int4;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16, int8 (8-bit codes) or uint8 (4-bit codes), not ",
                      torch::headeronly::toString(tensor.scalar_type()), ".");
  }
}

inline bool is_quantized(Format format) { return format == Format::int8 || format == Format::int4; }

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU.");
}

// A vector of `width` floating-point numbers; none for a tensor that is not given.
inline Numbers numbers_of(const std::optional<Tensor>& tensor, int64_t width, const char* name) {
  if (!tensor) return {};
  check_cpu(*tensor, name);
  STD_TORCH_CHECK(tensor->numel() == width && tensor->is_contiguous(), name, " must hold ", width,
                  " numbers, contiguous, not shape ", text_of(tensor->sizes().data(), tensor->sizes().size()), ".");
  const Format format = format_of(*tensor, name);
  STD_TORCH_CHECK(!is_quantized(format), name, " must be float32, bfloat16 or float16.");
  return {tensor->data_ptr(), format};
}

// The shape that a matrix of `format` has in memory, behind whatever dimensions its rows stand in.
inline Shape shape_in_memory(Format format, Shape rows, int64_t width) {
  if (format == Format::int4) {
    rows.push_back(rounded_up(width, kGroup) / kGroup);
    rows.push_back(kGroup / 2);
  } else {
    rows.push_back(format == Format::int8 ? rounded_up(width, kGroup) : width);
  }
  return rows;
}

// A matrix whose rows stand in dimensions of sizes `rows`, such as {outputs} or {blocks, units}, each of `width` numbers,
// with the scales that its format has.
inline Matrix matrix_of(const Tensor& tensor, const std::optional<Tensor>& scales, const Shape& rows, int64_t width,
                        const char* name) {
  check_cpu(tensor, name);
  Matrix matrix;
  matrix.format = format_of(tensor, name);
  check_shape(tensor, shape_in_memory(matrix.format, rows, width), name);
  matrix.rows = 1;
  for (const int64_t size : rows) matrix.rows *= size;
  matrix.width = width;
  matrix.data = tensor.data_ptr();
  matrix.stride = row_bytes(matrix.format, width);
  const bool strided = rows.size() == 1 && !is_quantized(matrix.format) && hfe::has_contiguous_rows(tensor);
  STD_TORCH_CHECK(strided || tensor.is_contiguous(), name, " must be contiguous.");
  if (strided) matrix.stride = tensor.stride(0) * (matrix.format == Format::float32 ? 4 : 2);
  if (!is_quantized(matrix.format)) {
    STD_TORCH_CHECK(!scales.has_value(), name, " of ", torch::headeronly::toString(tensor.scalar_type()),
                    " takes no scales; int8 and uint8 codes do.");
    return matrix;
  }
  STD_TORCH_CHECK(scales.has_value(), name, " holds codes and needs their scales.");
  check_cpu(*scales, name);
  const bool is_int8 = matrix.format == Format::int8;
  Shape shape = rows;
  if (!is_int8) shape.push_back(rounded_up(width, kGroup) / kGroup);
  const std::string scales_name = std::string("The scales of ") + name;
  check_shape(*scales, shape, scales_name.c_str());
  STD_TORCH_CHECK(scales->scalar_type() == (is_int8 ? ScalarType::Float : ScalarType::Half) && scales->is_contiguous(),
                  scales_name, " must be ", is_int8 ? "float32" : "float16", " and contiguous.");
  matrix.scales = scales->data_ptr();
  matrix.scale_stride = is_int8 ? 4 : 2 * shape.back();
  return matrix;
}

// Rows of a floating-point tensor in float32: in place, or in room of their own.
class FloatRows {
 public:
  FloatRows(const Tensor& tensor, const char* name) : count_(tensor.size(0)), width_(tensor.size(1)) {
    check_cpu(tensor, name);
    format_ = format_of(tensor, name);
    STD_TORCH_CHECK(!is_quantized(format_), name, " must be float32, bfloat16 or float16.");
    STD_TORCH_CHECK(hfe::has_contiguous_rows(tensor), name, " must be contiguous in its last dimension.");
    data_ = static_cast<char*>(tensor.data_ptr());
    stride_ = tensor.stride(0);
    if (format_ != Format::float32) room_ = Room<float>(count_ * width_);
  }

  // The rows as they are, and where they are not float32, a copy.
  float* read() {
    if (format_ == Format::float32) return numbers();
    for (int64_t i = 0; i < count_; ++i) widen({at(i), format_}, width_, room_ + i * width_);
    return room_;
  }

  // Where rows are to be written to, before `write`.
  float* numbers() { return format_ == Format::float32 ? reinterpret_cast<float*>(data_) : room_; }

  void write() {
    if (format_ == Format::float32) return;
    for (int64_t i = 0; i < count_; ++i) narrow(room_ + i * width_, width_, format_, at(i));
  }

  int64_t stride() const { return format_ == Format::float32 ? stride_ : width_; }

 private:
  char* at(int64_t i) const { return data_ + i * stride_ * 2; }

  int64_t count_, width_, stride_ = 0;
  Format format_ = Format::float32;
  char* data_ = nullptr;
  Room<float> room_;
};

}  // namespace decode_layer
