// What a call of the recurrence works on: sizes, pointers and strides, without any tensor library.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace sru {

using hfe::BoolView;
using hfe::DType;
using hfe::TensorView;

// In both passes `states` has length + 1 rows: before the first step in order of time, and after each. With `reverse`
// the last row is the initial state. A forward pass whose states nobody needs may give them a step stride of 0: one row,
// which holds the last one in the end. `weight_c` and `bias` (2, width), `c0` and `dropout` (batch, width) are contiguous
// and have the state's dtype, which is `states.dtype`; null where they are not given.
struct SruParams {
  int64_t batch = 0;
  int64_t length = 0;
  int64_t width = 0;
  int64_t parts = 0;  // 3, or 4 with the highway input as the fourth part of u
  TensorView u, x, h, states;
  const void* weight_c = nullptr;
  const void* bias = nullptr;
  const void* c0 = nullptr;
  const void* dropout = nullptr;
  BoolView mask, document_start;
  double scale_x = 1.0;
  bool tanh = false;
  bool reverse = false;
};

// The backward pass besides. What is not wanted or not given is null; the parameters' gradients and that of c0 are
// contiguous and have the state's dtype. `partial` has room for (batch, 4, width): what each row of the batch adds to
// the gradients of v_f, v_r, b_f and b_r. They are summed in the order of the batch, so that results do not depend on
// how work was divided.
struct SruBackwardParams : SruParams {
  TensorView grad_h, grad_states, grad_u, grad_x;
  void* grad_weight_c = nullptr;
  void* grad_bias = nullptr;
  void* grad_c0 = nullptr;
  void* partial = nullptr;
};

}  // namespace sru
