// Feed-forward layers, dense and sparse, in every format.
#pragma once

#include <vector>

#include "activation.h"
#include "matrix.h"
#include "norm.h"

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

struct LinearMap {
  Matrix matrix;
  Numbers bias;
};

// A branch beside a feed-forward layer: its own norm, a map to a few units, SRUs one after the other, and back. An SRU's
// map gives of each unit a candidate and what two gates begin as:
//
//     c = forget c + (1 - forget) candidate
//     x = output c + (1 - output) sqrt(3) x
struct RecurrentBranch {
  Norm norm;
  LinearMap in;                   // (units, width)
  std::vector<LinearMap> layers;  // (3 * units, units)
  LinearMap out;                  // (width, units)

  int64_t units() const { return in.matrix.rows; }
  int64_t state_size() const { return static_cast<int64_t>(layers.size()) * units(); }
  explicit operator bool() const { return !layers.empty(); }
};

// What the branch gives for rows of `x`, (count, width); states, (count, layers * units), `state_stride` apart, move on by
// one token.
void run_branch(const RecurrentBranch& branch, const float* x, int64_t count, float* state, int64_t state_stride,
                float* out);

// Adds the layer's results for all inputs to `y`, whose rows are `y_stride` apart. Of units that the activation makes 0
// the rows of `down` are not read.
void add_feed_forward(const DenseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride);

// The same; `winners`, where it is given, gets `blocks` numbers of units for each input.
void add_feed_forward(const SparseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride, int32_t* winners);

}  // namespace decode_layer
