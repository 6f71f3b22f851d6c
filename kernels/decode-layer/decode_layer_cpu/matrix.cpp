// Inputs of products, and products on several threads.

#include "matrix.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "functions.h"
#include "parallel.h"

namespace decode_layer {

RoundedInputs::RoundedInputs(Format format, int64_t count, int64_t width) : format_(format), width_(width) {
  const int64_t code_stride = rounded_up(width, kCodePadding);
  const int64_t scale_stride = format == Format::int8 ? 1 : code_stride / kGroup;
  codes_ = Room<int8_t>(count * code_stride);
  scales_ = Room<float>(count * scale_stride);
  if (format == Format::int8) {
    excess_ = Room<int32_t>(count);
  } else {
    offsets_ = Room<float>(count * scale_stride);
  }
  operands_.count = count;
  operands_.codes = codes_;
  operands_.code_stride = code_stride;
  operands_.scales = scales_;
  operands_.offsets = offsets_;
  operands_.excess = excess_;
  operands_.scale_stride = scale_stride;
}

void RoundedInputs::set(int64_t index, const float* numbers) {
  int8_t* const codes = codes_ + index * operands_.code_stride;
  const int64_t at = index * operands_.scale_stride;
  if (format_ == Format::int8) {
    functions().round_int8(numbers, width_, codes, scales_ + at, excess_ + index);
  } else {
    functions().round_int4(numbers, width_, codes, scales_ + at, offsets_ + at);
  }
}

Inputs::Inputs(const float* numbers, int64_t stride, int64_t count, int64_t width) : width_(width) {
  numbers_.count = count;
  numbers_.numbers = numbers;
  numbers_.stride = stride;
}

const Operands& Inputs::operands(Format format) {
  if (format != Format::int8 && format != Format::int4) return numbers_;
  RoundedInputs& rounded = format == Format::int8 ? int8_ : int4_;
  if (rounded.operands().codes == nullptr) {
    rounded = RoundedInputs(format, count(), width_);
    for (int64_t i = 0; i < count(); ++i) rounded.set(i, row(i));
  }
  return rounded.operands();
}

void multiply_rows(const Matrix& matrix, int64_t first, int64_t last, const Operands& operands, float* out,
                   int64_t out_stride) {
  functions().multiply[static_cast<int>(matrix.format)](matrix, first, last, operands, out, out_stride);
}

void multiply(const Matrix& matrix, const Operands& operands, float* out, int64_t out_stride) {
  const int64_t work = row_bytes(matrix.format, matrix.width) * std::max<int64_t>(1, operands.count / kFew);
  if (is_for_one_thread(matrix.rows, work)) return multiply_rows(matrix, 0, matrix.rows, operands, out, out_stride);
  Operands operands_of_part = operands;
  operands_of_part.upcoming = nullptr;  // of one thread alone
  for_each_part(matrix.rows, work, [&](int64_t first, int64_t last) {
    multiply_rows(matrix, first, last, operands_of_part, out, out_stride);
  });
}

void multiply(const Matrix& matrix, Inputs& inputs, float* out, int64_t out_stride) {
  multiply(matrix, inputs.operands(matrix.format), out, out_stride);
}

void add_bias(Numbers bias, int64_t width, float* out, int64_t out_stride, int64_t count) {
  if (!bias) return;
  for (int64_t i = 0; i < count; ++i) {
    functions().add_row[static_cast<int>(bias.format)](bias.data, nullptr, width, 1.0f, out + i * out_stride);
  }
}

void add_row(const Matrix& matrix, int64_t r, float factor, float* y) {
  functions().add_row[static_cast<int>(matrix.format)](matrix.row(r), matrix.row_scales(r), matrix.width, factor, y);
}

void add_part_of_row(const Matrix& matrix, int64_t r, int64_t first, int64_t count, float factor, float* y) {
  const int64_t scales = matrix.format == Format::int4 ? first / kGroup * 2 : 0;
  functions().add_row[static_cast<int>(matrix.format)](matrix.row(r) + row_bytes(matrix.format, first),
                                                      matrix.row_scales(r) + scales, count, factor, y);
}

void widen(Numbers from, int64_t count, float* to) {
  functions().widen[static_cast<int>(from.format)](from.data, count, to);
}

void narrow(const float* from, int64_t count, Format format, void* to) {
  functions().narrow[static_cast<int>(format)](from, count, to);
}

}  // namespace decode_layer
