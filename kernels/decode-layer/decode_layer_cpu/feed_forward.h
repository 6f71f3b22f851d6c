// Feed-forward layers, dense and sparse, in every format.
#pragma once

#include "activation.h"
#include "matrix.h"

namespace decode_layer {

using hfe::Activation;

// y += down . activate(up . x + inner bias) + bias
struct DenseFeedForward {
  Matrix up;    // (units, width)
  Matrix down;  // (width, units)
  Numbers inner_bias, bias;
  Activation activation = Activation::relu;
};

// Of each block one unit, which a controller chooses; hf_efficient/ops/sparse_ff.py says how. Rows of units stand block
// by block.
struct SparseFeedForward {
  Matrix controller_down;   // (rank, width)
  Matrix controller_up;     // (blocks * units, rank)
  Matrix up, down;          // (blocks * units, width), two matrices or both in one record a unit
  Numbers controller_bias;  // (blocks * units)
  Numbers inner_bias, bias;
  Activation activation = Activation::relu;
  bool multiply_by_controller = false;
  int64_t blocks = 0;
  int64_t units = 0;  // of a block
};

// Adds the layer's results for all inputs to `y`, whose rows are `y_stride` apart. Of units that the activation makes 0
// the rows of `down` are not read.
void add_feed_forward(const DenseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride);

// The same; `winners`, where it is given, gets `blocks` numbers of units for each input.
void add_feed_forward(const SparseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride, int32_t* winners);

}  // namespace decode_layer
