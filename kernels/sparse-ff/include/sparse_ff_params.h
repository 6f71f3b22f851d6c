// What a call of the sparse feed-forward works on: sizes, pointers and strides, without any tensor library.
#pragma once

#include <cstdint>

#include "activation.h"
#include "tensor_view.h"

namespace sparse_ff {

using hfe::Activation;
using hfe::DType;
using hfe::TensorView;

// Views of (blocks, units, numbers) have a block's stride as `batch_stride` and a unit's as `step_stride`; views of two
// dimensions have a row's stride as `batch_stride`. Last dimensions are contiguous. What is not given is null.
struct SparseFfParams {
  int64_t tokens = 0;
  int64_t width = 0;
  int64_t blocks = 0;
  int64_t units = 0;  // of a block
  int64_t rank = 0;
  TensorView x;                                // (tokens, width)
  TensorView controller_down, controller_up;   // (rank, width), (blocks, units, rank)
  TensorView controller_bias;                  // (blocks, units)
  TensorView up, down;                         // (blocks, units, width)
  TensorView bias, inner_bias;                 // (width), (blocks, units)
  TensorView y;                                // (tokens, width)
  int32_t* winners = nullptr;                  // (tokens, blocks)
  // Room on a GPU: (tokens, rank) for the controller's hidden values, and (tokens, blocks) for the winners' probabilities
  // and then for what they give.
  float* h = nullptr;
  float* hidden = nullptr;
  Activation activation = Activation::relu;
  bool multiply_by_controller = false;
};

HFE_INLINE int64_t row_of(const TensorView& view, int64_t block, int64_t unit) {
  return block * view.batch_stride + unit * view.step_stride;
}

}  // namespace sparse_ff
