// Attention of one token a row over the keys and values of the tokens before it and its own.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace decode_layer {

// Keys or values as they lie in memory: (rows, heads, capacity, size), of which the last dimension is contiguous
// and tokens follow one another; strides in elements.
struct CacheView {
  void* data = nullptr;
  int64_t size = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  Format format = Format::float32;  // not a quantised one
};

// Keys and values that lie in one place, `count` of each head.
struct KeyPart {
  CacheView keys, values;
  int64_t count = 0;
};

struct AttendParams {
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;
  KeyPart parts[2];                // keys of the second follow those of the first; one without keys counts for nothing
  const float* queries = nullptr;  // (rows, heads * head_dim)
  const float* mask = nullptr;     // (rows, count of both), added to the scores; null for none
  float* out = nullptr;            // (rows, heads * head_dim)
};

// A row to which nothing is left by the mask gets zeros.
void attend(const AttendParams& params);

// Asks for the first pages of each head's `count` tokens: they lie far apart, and are looked up many at a time.
void ask_for_tokens(const CacheView& view, int64_t rows, int64_t heads, int64_t head_dim, int64_t count);

// Where a head's tokens begin.
char* head_at(const CacheView& view, int64_t row, int64_t head);

// Writes `count` numbers of float32 into a head's room, as token `place`. Finite numbers stay finite: in float16 those
// beyond the largest become that one, since an infinite one makes NaN of what attends to it.
void write_vector(const CacheView& view, const float* vector, int64_t count, int64_t row, int64_t head, int64_t place);

// The same of all rows and heads, (rows, heads * head_dim).
void write_token(const CacheView& view, const float* vectors, int64_t rows, int64_t heads, int64_t head_dim,
                 int64_t place);

}  // namespace decode_layer
