// What is done with rows of weights, for one instruction set, and how they are chosen.
#pragma once

#include <cmath>

#include "activation.h"
#include "ahead.h"
#include "matrix.h"

namespace decode_layer {

// Of a softmax over keys that were seen: their largest score, and the sum of exponentials relative to it.
struct SoftmaxTotals {
  float most = -INFINITY;
  float sum = 0.0f;
};

struct Functions {
  // See `multiply_rows` of matrix.h; for each format.
  void (*multiply[5])(const Matrix& matrix, int64_t first, int64_t last, const Operands& operands, float* out,
                      int64_t out_stride);
  // See `add_row`; for each format.
  void (*add_row[5])(const void* row, const void* scales, int64_t width, float factor, float* y);
  // See `widen` and `narrow`; for each floating-point format.
  void (*widen[3])(const void* from, int64_t count, float* to);
  void (*narrow[3])(const float* from, int64_t count, void* to);
  // To float16, where finite numbers beyond the largest become that one.
  void (*narrow_finite)(const float* from, int64_t count, void* to);
  // Codes of an input, with zeros up to `kCodePadding`, its scale, and by how much sums of its products come out too
  // large.
  void (*round_int8)(const float* numbers, int64_t width, int8_t* codes, float* scale, int32_t* excess);
  // The same group by group; scales and offsets with zeros up to `kLanes` groups.
  void (*round_int4)(const float* numbers, int64_t width, int8_t* codes, float* scales, float* offsets);
  // Of a multiplicative layer, see gating.h: inputs times their gating, for formats up to int8, and what that gives times
  // rows of the projection, for each floating-point format.
  void (*gate[4])(const Matrix& gating, int64_t first, int64_t count, const float* x, float* out, int64_t out_stride);
  void (*multiply_inward[3])(const Matrix& projection, int64_t first, int64_t count, int64_t begin, int64_t end,
                             const float* gated, int64_t gated_stride, int64_t modules, float* y, hfe::Ahead& ahead);
  int64_t (*tiles)(int64_t modules, int64_t width);
  // Of a sparse feed-forward layer, see unit_loops.h and winner.h; the first for each format, the second for each
  // floating-point one.
  void (*block_logits[5])(const Matrix& controller, int64_t first, int64_t units, const Operands& x, const float* bias,
                          float* logits, int64_t logits_stride, hfe::Ahead& ahead);
  float (*unit_product[3])(const void* row, int64_t width, const float* x);
  int64_t (*winner)(const float* logits, int64_t units);
  float (*probability)(const float* logits, int64_t units, int64_t winner);
  void (*activate)(float* x, int64_t count, hfe::Activation activation);
  // See attend_loops.h; for each floating-point format.
  void (*attend[3])(const void* keys, const void* values, const void* next_keys, const void* next_values, int64_t count,
                    int64_t dim, const float* query, const float* mask, float* room, float* out, SoftmaxTotals& totals);
  void (*normalize_row)(const float* x, int64_t width, bool is_centered, float epsilon, const float* weight,
                        const float* bias, float* out);
  // See hash_loops.h; those of keys and values for each floating-point format.
  void (*hash_vector)(const float* vector, int64_t dim, const float* rotations, const int64_t* factors,
                      int64_t factor_count, int64_t rounds, float* room, int16_t* buckets);
  int64_t (*sharing_slots)(const int16_t* buckets, int64_t stride, int64_t rounds, const int16_t* wanted, int64_t count,
                           int64_t most, int32_t* slots);
  void (*score_slots[3])(const void* keys, int64_t stride, const int32_t* slots, int64_t count, int64_t dim,
                         const float* query, bool normalizes, float* scores);
  float (*weigh_slots)(float* scores, int64_t count);
  void (*add_slots[3])(const void* values, int64_t stride, const int32_t* slots, int64_t count, int64_t dim,
                       const float* weights, float* sums);
};

// Those of the instruction set in use.
const Functions& functions();

}  // namespace decode_layer
