// Multiplicative layers and convolutions over modules.

#include "modules.h"

#include <algorithm>

#include "products.h"

namespace decode_layer {
namespace {

// Inputs of a multiplicative layer that are worked on together: their rows of the projection stay in the nearest cache.
constexpr int64_t kPanel = 128;

// The products of each gating with the input stand in memory only for a panel of inputs.
void multiplicative_in_floats(const Multiplicative& layer, const float* x, float* y) {
  const Products& all = products();
  const int64_t modules = layer.modules(), size = layer.size();
  const Room<float> gated(modules * kPanel);
  std::fill_n(y, modules * size, 0.0f);
  for (int64_t first = 0; first < layer.inputs(); first += kPanel) {
    const int64_t count = std::min(kPanel, layer.inputs() - first);
    all.gate[static_cast<int>(layer.gating.format)](layer.gating, first, count, x, gated, kPanel);
    all.multiply_inward[static_cast<int>(layer.projection.format)](layer.projection, first, count, gated, kPanel,
                                                                   modules, y);
  }
}

void multiplicative_in_int8(const Multiplicative& layer, const float* x, float* y) {
  const int64_t modules = layer.modules(), inputs = layer.inputs();
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
  multiply_rows(layer.projection, 0, layer.projection.rows, rounded.operands(), y, layer.size());
}

int64_t image_size(const ModuleConv& conv) { return conv.window * conv.width * conv.channels; }

// Modules beyond the first and the last are zero.
template <typename Copy>
void for_each_module(const ModuleConv& conv, const float* const* tokens, int64_t count, int64_t modules, float* images,
                     const Copy& copy) {
  const int64_t size = image_size(conv);
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t s = 0; s < modules; ++s, images += size) {
      for (int64_t a = 0; a < conv.window; ++a) {
        for (int64_t b = 0; b < conv.width; ++b) {
          const int64_t from = s + b - conv.width / 2;
          const bool exists = from >= 0 && from < modules;
          copy(exists ? tokens[t * conv.window + a] + from * conv.channels : nullptr, images, a * conv.width + b);
        }
      }
    }
  }
}

Room<float> images_of(const ModuleConv& conv, const float* const* tokens, int64_t count, int64_t modules) {
  Room<float> images(count * modules * image_size(conv));
  const int64_t channels = conv.channels, places = conv.window * conv.width;
  if (conv.kernel.format == Format::int8) {
    for_each_module(conv, tokens, count, modules, images, [=](const float* from, float* image, int64_t place) {
      if (from) {
        std::copy_n(from, channels, image + place * channels);
      } else {
        std::fill_n(image + place * channels, channels, 0.0f);
      }
    });
  } else {
    for_each_module(conv, tokens, count, modules, images, [=](const float* from, float* image, int64_t place) {
      for (int64_t c = 0; c < channels; ++c) image[c * places + place] = from ? from[c] : 0.0f;
    });
  }
  return images;
}

}  // namespace

void multiplicative(const Multiplicative& layer, const float* x, float* y) {
  if (layer.projection.format == Format::int8) {
    multiplicative_in_int8(layer, x, y);
  } else {
    multiplicative_in_floats(layer, x, y);
  }
  add_bias(layer.bias, layer.modules() * layer.size(), y, 0, 1);
}

ModuleImages::ModuleImages(const ModuleConv& conv, const float* const* tokens, int64_t count, int64_t modules)
    : numbers_(images_of(conv, tokens, count, modules)),
      inputs_(numbers_, image_size(conv), count * modules, image_size(conv)) {}

void ModuleImages::convolve(const ModuleConv& conv, float* y) {
  multiply_rows(conv.kernel, 0, conv.size(), inputs_.operands(conv.kernel.format), y, conv.size());
  add_bias(conv.bias, conv.size(), y, conv.size(), inputs_.count());
}

}  // namespace decode_layer
