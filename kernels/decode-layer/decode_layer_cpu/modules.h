// Multiplicative layers and convolutions over modules of one token or several; hf_efficient/ops/multiplicative.py says what
// they compute. Floating-point weights stay in the layout of their torch modules, int8 has the layouts of
// hf_efficient/modules/quantized_layers.py.
#pragma once

#include "matrix.h"

namespace decode_layer {

// y[s, j] = sum over i of x[i] gating[s, i] projection[i, j] + bias
struct Multiplicative {
  Matrix gating;      // (modules, inputs)
  Matrix projection;  // floating point: (inputs, size); int8: transposed, (size, inputs)
  Numbers bias;       // (modules * size)

  int64_t modules() const { return gating.rows; }
  int64_t inputs() const { return gating.width; }
  int64_t size() const { return projection.format == Format::int8 ? projection.rows : projection.width; }
};

// One token: `x` has `inputs` numbers and `y` gets `modules * size`. In this thread.
void multiplicative(const Multiplicative& layer, const float* x, float* y);

// A convolution over the `window` tokens up to the present one and `width` neighbouring modules. A row of `kernel` holds
// `window * width * channels` numbers: floating point in the order (channels, window, width), int8 in the order (window,
// width, channels).
struct ModuleConv {
  Matrix kernel;  // (size, window * width * channels)
  Numbers bias;   // (size)
  int64_t channels = 0;
  int64_t window = 0;
  int64_t width = 0;

  int64_t size() const { return kernel.rows; }
};

// What convolutions of one shape see of some tokens, module by module. Convolutions with the same channels, window and
// width share it.
class ModuleImages {
 public:
  // `tokens` holds `window` rows of `modules * channels` numbers for each of `count` tokens, the present one last. The
  // shape and the order of numbers are those of `conv`.
  ModuleImages(const ModuleConv& conv, const float* const* tokens, int64_t count, int64_t modules);

  // y[t * modules * size + s * size + o]: `modules * size` numbers a token. In this thread.
  void convolve(const ModuleConv& conv, float* y);

 private:
  Room<float> numbers_;
  Inputs inputs_;
};

}  // namespace decode_layer
