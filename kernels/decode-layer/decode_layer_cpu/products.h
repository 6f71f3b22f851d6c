// What is done with rows of weights, for one instruction set, and how they are chosen.
#pragma once

#include "matrix.h"

namespace decode_layer {

struct Products {
  // See `multiply_rows` of matrix.h; for each format.
  void (*multiply[5])(const Matrix& matrix, int64_t first, int64_t last, const Operands& operands, float* out,
                      int64_t out_stride);
  // See `add_row`; for each format.
  void (*add_row[5])(const void* row, const void* scales, int64_t width, float factor, float* y);
  // See `widen` and `narrow`; for each floating-point format.
  void (*widen[3])(const void* from, int64_t count, float* to);
  void (*narrow[3])(const float* from, int64_t count, void* to);
  // Codes of an input, with zeros up to `kCodePadding`, its scale and the sum of its codes.
  void (*round_int8)(const float* numbers, int64_t width, int8_t* codes, float* scale, int32_t* sum);
  // The same group by group; scales and offsets with zeros up to `kLanes` groups.
  void (*round_int4)(const float* numbers, int64_t width, int8_t* codes, float* scales, float* offsets);
  // See attend_loops.h; for each floating-point format.
  void (*attend[3])(const void* keys, const void* values, const void* next_keys, const void* next_values, int64_t count,
                    int64_t dim, const float* query, const float* mask, float* room, float* out);
  void (*normalize_row)(const float* x, int64_t width, bool is_centered, float epsilon, const float* weight,
                        const float* bias, float* out);
};

// Those of the instruction set in use.
const Products& products();

}  // namespace decode_layer
