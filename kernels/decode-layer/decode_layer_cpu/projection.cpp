#include "projection.h"

#include <algorithm>

namespace decode_layer {

void write_images(const Projection& convolution, const float* tokens, int64_t window, int64_t width, float* images) {
  const int64_t channels = convolution.channels, beside = convolution.kernel_width / 2, modules = width / channels;
  const bool is_quantized = convolution.matrix.format == Format::int8 || convolution.matrix.format == Format::int4;
  const int64_t seen = window * convolution.kernel_width;
  for (int64_t s = 0; s < modules; ++s) {
    float* const image = images + s * seen * channels;
    for (int64_t t = 0; t < window; ++t) {
      for (int64_t k = 0; k < convolution.kernel_width; ++k) {
        const int64_t module = s + k - beside, place = t * convolution.kernel_width + k;
        const bool exists = module >= 0 && module < modules;
        const float* const from = tokens + t * width + module * channels;
        if (is_quantized) {
          float* const to = image + place * channels;
          if (exists) {
            std::copy(from, from + channels, to);
          } else {
            std::fill(to, to + channels, 0.0f);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) image[c * seen + place] = exists ? from[c] : 0.0f;
        }
      }
    }
  }
}

}  // namespace decode_layer
