// One step of SRU's recurrence for one unit, forward and backward, on the host and on the device.
//
// Sources: Lei et al., arXiv 1709.02755; Lei, arXiv 2102.12459, section 2. In the order of time,
//
//     f = sigmoid(u1 + v_f c + b_f)      r = sigmoid(u2 + v_r c + b_r)
//     c' = u0 + (c - u0) f               h = x' + (g(c') - x') m r        g: identity or tanh
//
// An argument that is not given has a neutral value: weights, biases, the state and the highway input 0, the dropout
// mask m 1. With x' = 0 the equation for h is the one without a skip connection.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace sru {

using hfe::same_bits;

// What `sru_step.h` asks of a kind of number, here of single ones; `lanes.h` has it for many.
// `limit` where it is less (greater) than x, else x, NaN too.
HFE_INLINE float at_most(float x, float limit) { return limit < x ? limit : x; }
HFE_INLINE float at_least(float x, float limit) { return limit > x ? limit : x; }
HFE_INLINE float where_less(float a, float b, float then, float otherwise) { return a < b ? then : otherwise; }
HFE_INLINE float shifted_left(float x, int bits) { return same_bits<float>(same_bits<uint32_t>(x) << bits); }
HFE_INLINE float magnitude(float x) { return fabsf(x); }
HFE_INLINE float with_sign(float x, float sign) { return copysignf(x, sign); }

#include "sru_step.h"

}  // namespace sru
