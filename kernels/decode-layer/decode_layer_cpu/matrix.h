// Matrices of weights in five formats, and their products with rows of float32 numbers.
//
//     Inputs inputs(x, stride, count, width);        // rounds them itself where a format wants that, once
//     multiply(matrix, inputs, out, out_stride);     // out[i * out_stride + r] = row r of the matrix . input i
//     add_bias(bias, matrix.rows, out, out_stride, count);
//
// A product is summed in one order, whatever other rows and inputs there are and for any number of threads. Integer
// sums are exact: every instruction set finds those of hf_efficient/ops/quantized.py. Weights may lie at any address.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "host_device.h"
#include "room.h"

namespace decode_layer {

using hfe::Room;

// Inputs up to which the time of a product is that of reading weights.
constexpr int64_t kFew = 8;

// Numbers of a row that have one scale in int4, and a multiple of which quantised rows are filled up to.
constexpr int64_t kGroup = 32;

// Rounded inputs are filled up with zeros to a multiple of this, in which groups fill registers of any width.
constexpr int64_t kCodePadding = 512;

HFE_INLINE int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

enum class Format : int32_t { float32, bfloat16, float16, int8, int4 };

// Numbers in a row of a floating-point format; none where `data` is null.
struct Numbers {
  const void* data = nullptr;
  Format format = Format::float32;

  HFE_INLINE explicit operator bool() const { return data != nullptr; }
};

// Bytes of a row's codes or numbers.
HFE_INLINE int64_t row_bytes(Format format, int64_t width) {
  switch (format) {
    case Format::float32: return 4 * width;
    case Format::int8: return rounded_up(width, kGroup);
    case Format::int4: return rounded_up(width, kGroup) / 2;
    default: return 2 * width;
  }
}

// A matrix (rows, width) row by row. int8 has codes in int8, filled up to whole groups, and a float32 scale a row; int4
// has 16 bytes a group and a float16 scale for each; see hf_efficient/ops/quantized.py. Other formats have no scales.
struct Matrix {
  const void* data = nullptr;
  const void* scales = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
  int64_t stride = 0;        // bytes from one row to the next
  int64_t scale_stride = 0;  // the same of scales
  Format format = Format::float32;

  HFE_INLINE const char* row(int64_t r) const { return static_cast<const char*>(data) + r * stride; }
  HFE_INLINE const char* row_scales(int64_t r) const { return static_cast<const char*>(scales) + r * scale_stride; }

  // Row `r` alone.
  HFE_INLINE Matrix only(int64_t r) const { return {row(r), row_scales(r), 1, width, stride, scale_stride, format}; }
};

// What products read of inputs: their numbers, or codes of 8 bits with scales.
struct Operands {
  int64_t count = 0;
  const float* numbers = nullptr;
  int64_t stride = 0;
  // Filled up to a multiple of `kCodePadding`, which is their stride too.
  const int8_t* codes = nullptr;
  int64_t code_stride = 0;
  // int8: one scale an input, and by how much sums of its products come out too large. int4: one scale a group, filled up
  // with zeros to `scale_stride`, and `offsets`, 8 times its sum of codes times the scale. The codes of int4 stand in the
  // order that packed weights have: of as many groups as a register holds the first halves, and then the second ones.
  const float* scales = nullptr;
  const float* offsets = nullptr;
  const int32_t* excess = nullptr;
  int64_t scale_stride = 0;
  // Of more than a few inputs, whose products leave memory idle: what is asked for meanwhile.
  hfe::Upcoming* upcoming = nullptr;

  // Inputs from `first` on.
  Operands part(int64_t first, int64_t some) const {
    return {some,        numbers ? numbers + first * stride : nullptr,        stride,
            codes ? codes + first * code_stride : nullptr,                    code_stride,
            scales ? scales + first * scale_stride : nullptr,                 offsets ? offsets + first * scale_stride : nullptr,
            excess ? excess + first : nullptr,                                scale_stride,
            upcoming};
  }
};

// Inputs rounded to 8 bits for weights of one format, int8 or int4.
class RoundedInputs {
 public:
  RoundedInputs() = default;
  RoundedInputs(Format format, int64_t count, int64_t width);

  // Rounds `width` numbers, which become input `index`.
  void set(int64_t index, const float* numbers);

  const Operands& operands() const { return operands_; }

 private:
  Format format_ = Format::int8;
  int64_t width_ = 0;
  Room<int8_t> codes_;
  Room<float> scales_, offsets_;
  Room<int32_t> excess_;
  Operands operands_;
};

// Rows of float32 numbers that matrices are multiplied with. They must stay as they are as long as this lives: what a
// format makes of them is kept for the next matrix.
class Inputs {
 public:
  Inputs(const float* numbers, int64_t stride, int64_t count, int64_t width);

  const Operands& operands(Format format);

  int64_t count() const { return numbers_.count; }
  int64_t width() const { return width_; }
  const float* row(int64_t index) const { return numbers_.numbers + index * numbers_.stride; }

 private:
  int64_t width_;
  Operands numbers_;
  RoundedInputs int8_, int4_;
};

// out[i * out_stride + r] of all rows, divided among threads where that pays.
void multiply(const Matrix& matrix, Inputs& inputs, float* out, int64_t out_stride);
void multiply(const Matrix& matrix, const Operands& operands, float* out, int64_t out_stride);

// The same of rows from `first` to `last`, in this thread.
void multiply_rows(const Matrix& matrix, int64_t first, int64_t last, const Operands& operands, float* out,
                   int64_t out_stride);

// Adds a bias of `width` numbers to each of `count` rows; does nothing where there is none.
void add_bias(Numbers bias, int64_t width, float* out, int64_t out_stride, int64_t count);

// y += factor * row `r` of the matrix.
void add_row(const Matrix& matrix, int64_t r, float factor, float* y);

// The same of `count` of its numbers from `first` on, which is a multiple of `kGroup`; y is that of the first.
void add_part_of_row(const Matrix& matrix, int64_t r, int64_t first, int64_t count, float factor, float* y);

// Numbers of a floating-point format as float32, and the other way round.
void widen(Numbers from, int64_t count, float* to);
void narrow(const float* from, int64_t count, Format format, void* to);

// The instruction set in use: "avx512_vnni", "avx512", "avx2" or "baseline".
const char* cpu_capability();

}  // namespace decode_layer
