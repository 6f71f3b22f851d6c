#include "norm.h"

#include "functions.h"

namespace decode_layer {

void normalize(const Norm& norm, const float* x, int64_t count, int64_t width, float* out) {
  Room<float> room(2 * width);
  float *const weight = room, *const bias = room + width;
  widen(norm.weight, width, weight);
  if (norm.bias) widen(norm.bias, width, bias);
  for (int64_t i = 0; i < count; ++i) {
    functions().normalize_row(x + i * width, width, norm.is_centered, norm.epsilon, weight, norm.bias ? bias : nullptr,
                             out + i * width);
  }
}

}  // namespace decode_layer
