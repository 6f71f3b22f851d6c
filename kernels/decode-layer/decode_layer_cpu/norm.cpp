#include "norm.h"

#include "products.h"

namespace decode_layer {

void normalize(const Norm& norm, const float* x, int64_t width, float* y) {
  products().normalize[static_cast<int>(norm.weight.format)](norm.weight.data, norm.bias.data, norm.epsilon,
                                                             norm.centered, x, width, y);
}

}  // namespace decode_layer
