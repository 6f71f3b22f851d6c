#include "projection.h"

#include <algorithm>

#include "functions.h"
#include "parallel.h"

namespace decode_layer {
namespace {

// Inputs of a multiplicative layer that are worked on together: their rows of the projection, one stream, stay in a near
// cache, and those after them beside them.
constexpr int64_t kMostInputs = 128, kFewestInputs = 4;
constexpr int64_t kPanelBytes = 1 << 18;

// Columns that one thread multiplies at least: whole tiles of each instruction set.
constexpr int64_t kColumns = 64;

// The products of each gating with the input stand in memory only for a panel of inputs.
void multiplicative_in_floats(const Projection& layer, const float* x, float* y, hfe::Ahead& ahead) {
  const Functions& all = functions();
  const int64_t modules = layer.gating.rows, size = layer.matrix.width, inputs = layer.gating.width;
  const int64_t panel =
      std::clamp(kPanelBytes / std::max<int64_t>(1, layer.matrix.stride), kFewestInputs, kMostInputs);
  const auto multiply = [&](int64_t begin, int64_t end, hfe::Ahead& others) {
    const Room<float> gated(modules * panel);
    for (int64_t s = 0; s < modules; ++s) std::fill(y + s * size + begin, y + s * size + end, 0.0f);
    for (int64_t first = 0; first < inputs; first += panel) {
      const int64_t count = std::min(panel, inputs - first), next = first + count;
      hfe::touch_pages(layer.matrix.row(next), std::min(panel, inputs - next) * layer.matrix.stride);
      all.gate[static_cast<int>(layer.gating.format)](layer.gating, first, count, x, gated, panel);
      all.multiply_inward[static_cast<int>(layer.matrix.format)](layer.matrix, first, count, begin, end, gated, panel,
                                                                 modules, y, others);
    }
  };
  const int64_t parts = (size + kColumns - 1) / kColumns;
  const int64_t bytes = row_bytes(layer.matrix.format, inputs * kColumns);
  if (is_for_one_thread(parts, bytes)) {
    ahead.spread(inputs * all.tiles(modules, size));
    multiply(0, size, ahead);
    return;
  }
  for_each_part(parts, bytes, [&](int64_t first, int64_t last) {
    hfe::Ahead nothing;
    multiply(first * kColumns, std::min(size, last * kColumns), nothing);
  });
}

void multiplicative_in_int8(const Projection& layer, const float* x, float* y, hfe::Ahead& ahead) {
  const int64_t modules = layer.gating.rows, inputs = layer.gating.width;
  const Room<float> gated(inputs);
  RoundedInputs rounded(Format::int8, modules, inputs);
  Matrix gating = layer.gating;
  gating.rows = 1;
  ahead.spread(modules);
  for (int64_t s = 0; s < modules; ++s) {
    ahead.step();
    gating.data = layer.gating.row(s);
    gating.scales = layer.gating.row_scales(s);
    functions().gate[static_cast<int>(gating.format)](gating, 0, inputs, x, gated, inputs);
    rounded.set(s, gated);
  }
  multiply(layer.matrix, rounded.operands(), y, layer.matrix.rows);
}

}  // namespace

void multiplicative(const Projection& projection, Inputs& inputs, float* out, int64_t stride, hfe::Ahead& ahead) {
  if (projection.outputs() == 0) return;
  const bool is_int8 = projection.matrix.format == Format::int8;
  for (int64_t i = 0; i < inputs.count(); ++i) {
    float* const y = out + i * stride;
    is_int8 ? multiplicative_in_int8(projection, inputs.row(i), y, ahead)
            : multiplicative_in_floats(projection, inputs.row(i), y, ahead);
  }
  add_bias(projection.bias, projection.outputs(), out, stride, inputs.count());
}

void ask_for(const Projection& projection, hfe::Ahead& ahead) {
  for (const Matrix* matrix : {&projection.gating, &projection.matrix}) {
    const int64_t bytes = matrix->rows * matrix->stride;
    if (bytes > 0 && bytes <= kPanelBytes) ahead.add(matrix->row(0), bytes);
  }
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
