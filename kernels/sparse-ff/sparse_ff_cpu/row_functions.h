// What is done with rows of weights, for one dtype and one instruction set, and how they are chosen.
#pragma once

#include <cstdint>

#include "../include/sparse_ff_params.h"
#include "ahead.h"
#include "unit_pipeline.h"

namespace sparse_ff {

using hfe::Ahead;
using hfe::kAheadBytes;
using hfe::prefetch_ahead;
using hfe::touch_pages;

constexpr int64_t kFew = hfe::kFewTokens;

// Room for units' logits is padded to a multiple of this.
constexpr int64_t kPadding = 16;

HFE_INLINE int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// Rows of weights in one dtype. Every sum is taken in one order, however many tokens there are, so that a token's result
// does not depend on the others.
struct RowFunctions {
  // The products of each of `count` rows with the inputs of up to `kFew` tokens: out[token * out_stride + row].
  void (*project)(const void* rows, int64_t stride, int64_t count, int64_t width, const float* const* x, int64_t tokens,
                  float* out, int64_t out_stride);
  // Logits of a block's units for up to `kFew` tokens. `h` has zeros up to `h_stride`, `bias` and `logits` have room for
  // `padded(units)` numbers a token; what stands behind the units' own logits wins against none of them. A step of
  // `ahead` for each four units.
  void (*logits)(const void* rows, int64_t stride, int64_t units, int64_t rank, const float* h, int64_t h_stride,
                 int64_t tokens, const float* bias, float* logits, Ahead& ahead);
  // The products of one row with `count` inputs.
  void (*multiply)(const void* row, int64_t width, const float* const* x, int64_t count, float* out);
  // y += scale row for `count` tokens.
  void (*add)(const void* row, int64_t width, const float* scales, float* const* y, int64_t count);
  // Numbers of this dtype as float32, and the other way round.
  void (*widen)(const void* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, void* to);
};

struct Functions {
  RowFunctions float32, bfloat16, float16;
  // The first largest of `padded(units)` logits.
  int64_t (*winner)(const float* logits, int64_t units);
  // The softmax of `units` logits at the winner.
  float (*probability)(const float* logits, int64_t units, int64_t winner);
};

// Those of the instruction set in use.
const Functions& functions();

inline const RowFunctions& row_functions(DType dtype) {
  const Functions& all = functions();
  return dtype == DType::float32 ? all.float32 : dtype == DType::bfloat16 ? all.bfloat16 : all.float16;
}

}  // namespace sparse_ff
