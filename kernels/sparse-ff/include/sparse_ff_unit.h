// What a winner gives, and which unit wins, on the host and on the device.
//
// Source: Jaszczur et al., arXiv 2111.12763, section 3.1. With h the controller's hidden values, for each block
//
//     l_n = C_n h + c_n        n* = first largest of the l_n        a = g(U_n* x + u_n*)        y += a D_n*
#pragma once

#include <cstdint>

#include "convert.h"
#include "sparse_ff_params.h"

namespace sparse_ff {

using hfe::activate;
using hfe::BFloat16;
using hfe::Float16;
using hfe::widen;

// Whether `logit` of unit `n` wins against `best` of unit `best_n`: the larger one, the first of equal ones, and NaN
// before all others.
HFE_INLINE bool wins(float logit, int64_t n, float best, int64_t best_n) {
  const bool is_nan = logit != logit, best_is_nan = best != best;
  if (is_nan != best_is_nan) return is_nan;
  if (is_nan || logit == best) return n < best_n;
  return logit > best;
}

// One number of any dtype.
HFE_INLINE float number_at(const TensorView& view, int64_t index) {
  if (view.dtype == DType::float32) return static_cast<const float*>(view.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(view.data)[index];
  return view.dtype == DType::bfloat16 ? hfe::from_bfloat16(bits) : hfe::from_float16(bits);
}

HFE_INLINE void set_number(const TensorView& view, int64_t index, float value) {
  if (view.dtype == DType::float32) {
    static_cast<float*>(view.data)[index] = value;
  } else {
    static_cast<uint16_t*>(view.data)[index] =
        view.dtype == DType::bfloat16 ? hfe::to_bfloat16(value) : hfe::to_float16(value);
  }
}

}  // namespace sparse_ff
