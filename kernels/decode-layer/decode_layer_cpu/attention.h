// Attention of one token a row, to the tokens before it or to a source, from the norm before it to the residual behind it.
#pragma once

#include <cstdint>

#include "attend.h"
#include "hashed.h"
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
  Hashing hashing;     // queries are keys then, the average of both maps where there are two
};

// Rows of numbers that hold from one token to the next, `stride` apart.
struct State {
  float* data = nullptr;
  int64_t stride = 0;
};

// What a layer is called with: `from` and `to`, (rows, width), may be the same.
struct Streams {
  const float* from = nullptr;
  float* to = nullptr;
};

struct AttentionStep {
  hfe::Upcoming* upcoming = nullptr;  // what is read after this layer
  KeyPart source;           // stands in front of all other keys, and is only read
  CacheView keys, values;   // rooms
  BucketView source_buckets, buckets;  // where layers hash
  State state;              // (rows, (window - 1) * width)
  const float* mask = nullptr;
  int64_t filled = 0;
};

// Adds to `to` what the attention of `from` over a source, `filled` tokens and this one gives. Its key and value become
// token `filled` of the rooms; the state moves on by one token.
void attention(const AttentionLayer& layer, Streams streams, const AttentionStep& step);

// A map of the input, and a convolution over the last tokens of what it gives, if there is one.
struct WindowedMap {
  Projection map, conv;
};

struct CrossAttentionLayer {
  int64_t rows = 0;
  int64_t width = 0;
  int64_t heads = 0;
  Norm norm;
  int64_t window = 0;
  WindowedMap query, output;  // each may be absent
};

struct CrossAttentionStep {
  hfe::Upcoming* upcoming = nullptr;
  KeyPart source;
  State query_state, output_state;
  const float* mask = nullptr;
};

// Adds to `to` what the attention of `from` to a source gives.
void cross_attention(const CrossAttentionLayer& layer, Streams streams, const CrossAttentionStep& step);

}  // namespace decode_layer
