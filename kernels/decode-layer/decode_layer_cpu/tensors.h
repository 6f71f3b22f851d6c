// Weights as ops are given them: tensors, checked and read as matrices. Nothing is copied.
#pragma once

#include <optional>
#include <string>

#include "matrix.h"
#include "feed_forward.h"
#include "projection.h"
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

// Of what a tensor of this format holds: codes of int4 come in pairs.
inline int64_t bytes_of_element(Format format) {
  return format == Format::float32 ? 4 : is_quantized(format) ? 1 : 2;
}

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
  // Rows of one dimension may lie apart, as in records that hold more.
  const int64_t inside = tensor.dim() - 1;
  const bool has_rows = tensor.size(inside) == 1 || tensor.stride(inside) == 1;
  const bool has_groups = matrix.format != Format::int4 || tensor.size(1) == 1 || tensor.stride(1) == kGroup / 2;
  const bool is_strided = rows.size() == 1 && has_rows && has_groups;
  STD_TORCH_CHECK(is_strided || tensor.is_contiguous(), name, " must be contiguous",
                  rows.size() == 1 ? " in each row." : ".");
  if (is_strided && matrix.rows > 1) matrix.stride = tensor.stride(0) * bytes_of_element(matrix.format);
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

// A multiplicative layer of `inputs` numbers, in floating point or int8.
inline Projection multiplicative_of(const Tensor& gating, const std::optional<Tensor>& gating_scales,
                                    const Tensor& projection, const std::optional<Tensor>& projection_scales,
                                    const std::optional<Tensor>& bias, int64_t inputs) {
  Projection layer;
  layer.map = Map::multiplicative;
  STD_TORCH_CHECK(gating.dim() == 2 && projection.dim() == 2,
                  "gating and projection must have two dimensions, in float32, bfloat16, float16 or int8.");
  layer.gating = matrix_of(gating, gating_scales, {gating.size(0)}, inputs, "gating");
  const bool is_int8 = projection.scalar_type() == ScalarType::Char;
  layer.matrix = is_int8 ? matrix_of(projection, projection_scales, {projection.size(0)}, inputs, "projection")
                         : matrix_of(projection, projection_scales, {inputs}, projection.size(1), "projection");
  STD_TORCH_CHECK((layer.gating.format == Format::int8) == is_int8, "gating and projection must both be int8, or neither.");
  layer.bias = numbers_of(bias, layer.outputs(), "bias");
  return layer;
}

// A convolution over `window` tokens and `width` modules of `channels` numbers, which makes `size` of them, in floating
// point or int8.
inline Projection convolution_of(const Tensor& kernel, const std::optional<Tensor>& scales,
                                 const std::optional<Tensor>& bias, int64_t size, int64_t channels, int64_t window,
                                 int64_t width) {
  STD_TORCH_CHECK(window > 0 && width > 0 && width % 2 == 1, "window must be at least 1 and width an odd number, not ",
                  window, " and ", width, ".");
  STD_TORCH_CHECK(channels > 0, "A module must have at least one channel.");
  Projection conv;
  conv.map = Map::convolution;
  conv.channels = channels;
  conv.kernel_width = width;
  const int64_t seen = channels * window * width;
  const Format format = format_of(kernel, "kernel");
  STD_TORCH_CHECK(format != Format::int4, "kernel must be float32, bfloat16, float16 or int8.");
  if (format == Format::int8) {
    conv.matrix = matrix_of(kernel, scales, {size}, seen, "kernel");
  } else {
    check_cpu(kernel, "kernel");
    check_shape(kernel, {size, channels, window, width}, "kernel");
    STD_TORCH_CHECK(kernel.is_contiguous() && !scales.has_value(),
                    "A kernel of floating-point numbers must be contiguous, and takes no scales.");
    conv.matrix.data = kernel.data_ptr();
    conv.matrix.rows = size;
    conv.matrix.width = seen;
    conv.matrix.stride = row_bytes(format, seen);
    conv.matrix.format = format;
  }
  conv.bias = numbers_of(bias, conv.outputs(), "bias");
  return conv;
}

// Rows of units in floating point, (blocks, units, width), which may lie apart, as in records that hold both rows of a
// unit.
inline Matrix unit_rows_of(const Tensor& tensor, int64_t blocks, int64_t units, int64_t width, const char* name) {
  check_cpu(tensor, name);
  Matrix matrix;
  matrix.format = format_of(tensor, name);
  STD_TORCH_CHECK(!is_quantized(matrix.format), name, " must be float32, bfloat16 or float16.");
  check_shape(tensor, {blocks, units, width}, name);
  const int64_t stride = units > 1 ? tensor.stride(1) : tensor.stride(0);
  STD_TORCH_CHECK((width == 1 || tensor.stride(2) == 1) && (blocks == 1 || tensor.stride(0) == units * stride), name,
                  " must be contiguous in its last dimension, and blocks must follow one another.");
  matrix.data = tensor.data_ptr();
  matrix.rows = blocks * units;
  matrix.width = width;
  matrix.stride = stride * bytes_of_element(matrix.format);
  return matrix;
}

inline Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new") return Activation::gelu_new;
  STD_TORCH_CHECK(name == "silu", "activation must be relu, gelu, gelu_new or silu, not ", name, ".");
  return Activation::silu;
}

// A sparse layer's dimensions, `rank` that of its controller. A block without units has no winner.
inline void check_dimensions(const SparseFeedForward& layer, int64_t width, int64_t rank) {
  STD_TORCH_CHECK(width > 0 && layer.blocks > 0 && layer.units > 0 && rank > 0,
                  "No dimension but that of tokens may be 0; the width is ", width, ", and there are ", layer.blocks,
                  " blocks of ", layer.units, " units, of rank ", rank, ".");
}

// Rows of units in records [up codes | down codes | up scales | down scales], (blocks, units, bytes) in uint8; the format
// is that whose records have so many bytes.
inline void read_records(SparseFeedForward& layer, const Tensor& records, int64_t width) {
  constexpr int64_t kAlignment = 64;
  check_cpu(records, "units");
  STD_TORCH_CHECK(records.dim() == 3 && records.scalar_type() == ScalarType::Byte && records.is_contiguous(),
                  "units must have shape (blocks, units, bytes), uint8 and contiguous.");
  const int64_t groups = rounded_up(width, kGroup) / kGroup, bytes = records.size(2);
  for (const Format format : {Format::int8, Format::int4}) {
    const int64_t codes = row_bytes(format, width), scales = format == Format::int8 ? 4 : 2 * groups;
    if (bytes != rounded_up(2 * (codes + scales), kAlignment)) continue;
    const char* const data = static_cast<const char*>(records.data_ptr());
    const int64_t rows = layer.blocks * layer.units;
    layer.up = {data, data + 2 * codes, rows, width, bytes, bytes, format};
    layer.down = {data + codes, data + 2 * codes + scales, rows, width, bytes, bytes, format};
    return;
  }
  STD_TORCH_CHECK(false, "units have ", bytes, " bytes a record, which is no format of rows of ", width, " numbers.");
}

// Rows of float32 numbers that are read and written in place.
inline float* float_rows(const Tensor& tensor, int64_t rows, int64_t width, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(0) == rows && tensor.numel() == rows * width, name,
                  " must have shape (", rows, ", ", width, "), not ",
                  text_of(tensor.sizes().data(), tensor.sizes().size()), ".");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  " must be float32 and contiguous.");
  return static_cast<float*>(tensor.data_ptr());
}

// The same where rows may lie apart; their distance.
inline float* float_rows(const Tensor& tensor, int64_t rows, int64_t width, int64_t& stride, const char* name) {
  check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) == rows && tensor.numel() == rows * width, name,
                  " must have shape (", rows, ", ", width, "), not ",
                  text_of(tensor.sizes().data(), tensor.sizes().size()), ".");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32.");
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i > 0; --i) {
    STD_TORCH_CHECK(tensor.size(i) == 1 || tensor.stride(i) == expected, name, " must be contiguous in each row.");
    expected *= tensor.size(i);
  }
  stride = tensor.stride(0);
  STD_TORCH_CHECK(rows == 1 || stride >= width, "Rows of ", name, " must not overlap.");
  return static_cast<float*>(tensor.data_ptr());
}

// Rows of a floating-point tensor in float32: in place, or in room of their own.
class WidenedRows {
 public:
  WidenedRows(const Tensor& tensor, const char* name) : count_(tensor.size(0)), width_(tensor.size(1)) {
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
