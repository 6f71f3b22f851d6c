// LayerNorm and RMSNorm of rows.
#pragma once

#include "matrix.h"

namespace decode_layer {

struct Norm {
  Numbers weight;       // must be given
  Numbers bias;         // in the format of `weight`, or none
  float epsilon = 0.0f;
  bool centered = true;  // LayerNorm, which takes the mean off; else RMSNorm
};

// `width` numbers at `y` from those at `x`, which may be the same.
void normalize(const Norm& norm, const float* x, int64_t width, float* y);

}  // namespace decode_layer
