// Maps of a vector, in any of the forms that attention has.
#pragma once

#include <cstdint>

#include "ahead.h"
#include "matrix.h"

namespace decode_layer {

enum class Map : int32_t { none, linear, multiplicative, convolution };

struct Projection {
  Map map = Map::none;
  // linear: (outputs, width). multiplicative: a projection in int8 is (size, width), a float one (width, size).
  // convolution: (size, channels * window * kernel_width), of floats with the channels slowest, else with them fastest.
  Matrix matrix;
  Matrix gating;  // (modules, width), of a multiplicative map
  Numbers bias;   // of all outputs, or of one module's
  int64_t channels = 0;
  int64_t kernel_width = 0;

  // Of one module.
  int64_t size() const {
    return map == Map::multiplicative && matrix.format != Format::int8 ? matrix.width : matrix.rows;
  }

  int64_t outputs() const { return map == Map::multiplicative ? gating.rows * size() : matrix.rows; }

  explicit operator bool() const { return map != Map::none; }
};

// out[i * stride + s * size + j] = gated input i . column j, where module s gates the input by its row. Divided among
// threads where that pays. Multiplications are what takes time here: what `ahead` holds is read from memory meanwhile.
void multiplicative(const Projection& projection, Inputs& inputs, float* out, int64_t stride, hfe::Ahead& ahead);

// The weights of a map, which are read soon.
void ask_for(const Projection& projection, hfe::Ahead& ahead);

// Images of the modules of `window` tokens, (modules, channels * window * kernel_width) in the order of a convolution's
// matrix. What stands beyond the first module and the last is zero.
void write_images(const Projection& convolution, const float* tokens, int64_t window, int64_t width, float* images);

}  // namespace decode_layer
