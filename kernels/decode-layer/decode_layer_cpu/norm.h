// LayerNorm and RMSNorm.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace decode_layer {

struct Norm {
  Numbers weight;
  Numbers bias;  // of LayerNorm
  float epsilon = 0.0f;
  bool is_centered = true;  // RMSNorm is not
};

// Each of `count` rows of `width` numbers; rows of `out` follow one another.
void normalize(const Norm& norm, const float* x, int64_t count, int64_t width, float* out);

}  // namespace decode_layer
