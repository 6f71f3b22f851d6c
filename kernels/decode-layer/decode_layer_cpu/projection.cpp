#include "projection.h"

#include <algorithm>

#include "products.h"

namespace decode_layer {
namespace {

// Inputs of a multiplicative layer that are worked on together: their rows of the projection stay in the nearest cache.
constexpr int64_t kPanel = 128;

// The products of each gating with the input stand in memory only for a panel of inputs.
void multiplicative_in_floats(const Projection& layer, const float* x, float* y) {
  const Products& all = products();
  const int64_t modules = layer.gating.rows, size = layer.matrix.width;
  const Room<float> gated(modules * kPanel);
  std::fill_n(y, modules * size, 0.0f);
  for (int64_t first = 0; first < layer.gating.width; first += kPanel) {
    const int64_t count = std::min(kPanel, layer.gating.width - first);
    all.gate[static_cast<int>(layer.gating.format)](layer.gating, first, count, x, gated, kPanel);
    all.multiply_inward[static_cast<int>(layer.matrix.format)](layer.matrix, first, count, gated, kPanel,
                                                                   modules, y);
  }
}

void multiplicative_in_int8(const Projection& layer, const float* x, float* y) {
  const int64_t modules = layer.gating.rows, inputs = layer.gating.width;
  const Room<float> gated(inputs);
  RoundedInputs rounded(Format::int8, modules, inputs);
  Matrix gating = layer.gating;
  gating.rows = 1;
  for (int64_t s = 0; s < modules; ++s) {
    gating.data = layer.gating.row(s);
    gating.scales = layer.gating.row_scales(s);
    products().gate[static_cast<int>(gating.format)](gating, 0, inputs, x, gated, inputs);
    rounded.set(s, gated);
  }
  multiply_rows(layer.matrix, 0, layer.matrix.rows, rounded.operands(), y, layer.matrix.rows);
}

}  // namespace

void multiplicative(const Projection& projection, Inputs& inputs, float* out, int64_t stride) {
  const bool is_int8 = projection.matrix.format == Format::int8;
  for (int64_t i = 0; i < inputs.count(); ++i) {
    float* const y = out + i * stride;
    is_int8 ? multiplicative_in_int8(projection, inputs.row(i), y)
            : multiplicative_in_floats(projection, inputs.row(i), y);
  }
  add_bias(projection.bias, projection.outputs(), out, stride, inputs.count());
}

void write_images(const Projection& convolution, const float* tokens, int64_t window, int64_t width, float* images) {
  const int64_t channels = convolution.channels, beside = convolution.kernel_width / 2, modules = width / channels;
  const bool is_int8 = convolution.matrix.format == Format::int8;
  const int64_t seen = window * convolution.kernel_width;
  for (int64_t s = 0; s < modules; ++s) {
    float* const image = images + s * seen * channels;
    for (int64_t t = 0; t < window; ++t) {
      for (int64_t k = 0; k < convolution.kernel_width; ++k) {
        const int64_t module = s + k - beside, place = t * convolution.kernel_width + k;
        const bool exists = module >= 0 && module < modules;
        const float* const from = tokens + t * width + module * channels;
        if (is_int8) {
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
