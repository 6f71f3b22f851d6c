// What a call of the recurrence works on: sizes, pointers and strides, without any tensor library.
#pragma once

#include <cstdint>

namespace sru {

enum class Kind : int32_t { float32, float64, bfloat16, float16 };

// A tensor (batch, length, [parts,] width) whose last dimension is contiguous; strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t step_stride = 0;
  int64_t part_stride = 0;
  Kind kind = Kind::float32;

  explicit operator bool() const { return data != nullptr; }
};

// A boolean tensor (batch, length).
struct Flags {
  const bool* data = nullptr;
  int64_t batch_stride = 0;
  int64_t step_stride = 0;
};

// In both passes `states` has length + 1 rows: before the first step in order of time, and after each. With `reverse`
// the last row is the initial state. A forward pass whose states nobody needs may give them a step stride of 0: one row,
// which holds the last one in the end. `weight_c` and `bias` (2, width), `c0` and `dropout` (batch, width) are contiguous
// and have the state's dtype, which is `states.kind`; null where they are not given.
struct Problem {
  int64_t batch = 0;
  int64_t length = 0;
  int64_t width = 0;
  int64_t parts = 0;  // 3, or 4 with the highway input as the fourth part of u
  Rows u, x, h, states;
  const void* weight_c = nullptr;
  const void* bias = nullptr;
  const void* c0 = nullptr;
  const void* dropout = nullptr;
  Flags mask, reset;
  double scale_x = 1.0;
  bool tanh = false;
  bool reverse = false;
};

// The backward pass besides. What is not wanted or not given is null; the parameters' gradients and that of c0 are
// contiguous and have the state's dtype. `partial` has room for (batch, 4, width): what each row of the batch adds to
// the gradients of v_f, v_r, b_f and b_r. They are summed in the order of the batch, so that results do not depend on
// how work was divided.
struct BackwardProblem : Problem {
  Rows grad_h, grad_states, grad_u, grad_x;
  void* grad_weight_c = nullptr;
  void* grad_bias = nullptr;
  void* grad_c0 = nullptr;
  void* partial = nullptr;
};

}  // namespace sru
