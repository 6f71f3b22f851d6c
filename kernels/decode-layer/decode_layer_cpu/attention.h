// One layer's attention of one token a row, from the norm before it to the residual behind it.
#pragma once

#include <cstdint>

#include "attend.h"
#include "matrix.h"
#include "norm.h"
#include "projection.h"

namespace decode_layer {

struct AttentionLayer {
  int64_t rows = 0;
  int64_t width = 0;
  int64_t heads = 0;
  Norm norm;
  // Of the input where there is no window; of what `shared` makes of it where there is, the query's convolution too where
  // the key has none.
  Projection query, key, value;
  Projection shared;
  int64_t window = 0;  // tokens that convolutions see
  Projection output;   // may be absent
};

// Adds to `hidden`, (rows, width), what the attention over `filled` tokens and this one gives. Their key and value become
// token `filled` of the rooms; `state`, (rows, (window - 1) * width), moves on by one token.
void attention(const AttentionLayer& layer, float* hidden, const CacheView& keys, const CacheView& values, float* state,
               const float* mask, int64_t filled);

}  // namespace decode_layer
