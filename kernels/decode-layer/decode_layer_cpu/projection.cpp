#include "projection.h"

#include <algorithm>

namespace decode_layer {

void multiplicative(const Projection& projection, Inputs& inputs, float* out, int64_t stride) {
  const Matrix &gating = projection.gating, &matrix = projection.matrix;
  const int64_t width = gating.width, modules = gating.rows;
  const bool is_quantized = matrix.format == Format::int8 || matrix.format == Format::int4;
  const int64_t size = is_quantized ? matrix.rows : matrix.width, count = inputs.count() * modules;
  Room<float> gated(count * width);
  std::fill(gated + 0, gated + count * width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    float* const row = gated + i * width;
    const float* const x = inputs.row(i / modules);
    add_row(gating, i % modules, 1.0f, row);
    for (int64_t j = 0; j < width; ++j) row[j] *= x[j];
  }
  if (is_quantized) {
    for (int64_t i = 0; i < inputs.count(); ++i) {
      RoundedInputs rounded(matrix.format, modules, width);
      for (int64_t s = 0; s < modules; ++s) rounded.set(s, gated + (i * modules + s) * width);
      multiply(matrix, rounded.operands(), out + i * stride, size);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      float* const to = out + i / modules * stride + i % modules * size;
      std::fill(to, to + size, 0.0f);
      for (int64_t j = 0; j < width; ++j) add_row(matrix, j, gated[i * width + j], to);
    }
  }
  add_bias(projection.bias, modules * size, out, stride, inputs.count());
}

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
