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

HFE_INLINE double exponential(double x) { return exp(x); }

// e^x for |x| <= 87. On the host a polynomial without branches, which compilers turn into vector code: x = n ln 2 + r,
// e^x = 2^n e^r, relative error below 1e-7. Beyond the range it stays finite, and NaN stays NaN.
HFE_INLINE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  x = x > 87.0f ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the last bits.
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in few bits
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * same_bits<float>((same_bits<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);  // 2^n
#endif
}

HFE_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

HFE_INLINE double reciprocal(double x) { return 1.0 / x; }

template <typename S>
HFE_INLINE S sigmoid(S x) {
  return reciprocal(S(1) + exponential(-x));
}

HFE_INLINE double hyperbolic_tangent(double x) { return tanh(x); }

// Near 0, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial; both are computed and one is taken.
HFE_INLINE float hyperbolic_tangent(float x) {
  const float size = fabsf(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = 1.0f - 2.0f * reciprocal(exponential(2.0f * (size > 40.0f ? 40.0f : size)) + 1.0f);
  return size < 0.625f ? near : copysignf(far, x);
}

template <bool Tanh, typename S>
HFE_INLINE S activate(S c) {
  if constexpr (Tanh) {
    return hyperbolic_tangent(c);
  } else {
    return c;
  }
}

// What a unit has for all steps.
template <typename S>
struct Unit {
  S forget_gate_weight, output_gate_weight, forget_gate_bias, output_gate_bias, dropout;
};

// What a unit reads at one step; `before` is c, zero where a document begins.
template <typename S>
struct Inputs {
  S u0, u1, u2, x, before;
};

template <typename S>
struct Gates {
  S forget, output;
};

// The bias is added to what does not wait for the step before: one operation less on the chain of dependent ones.
template <typename S>
HFE_INLINE Gates<S> gates_of(const Unit<S>& unit, const Inputs<S>& in) {
  return {sigmoid(in.before * unit.forget_gate_weight + (in.u1 + unit.forget_gate_bias)),
          sigmoid(in.before * unit.output_gate_weight + (in.u2 + unit.output_gate_bias))};
}

template <typename S>
struct Outputs {
  S h, after;
};

template <bool Tanh, typename S>
HFE_INLINE Outputs<S> forward_step(const Unit<S>& unit, const Inputs<S>& in) {
  const Gates<S> gates = gates_of(unit, in);
  const S after = in.u0 + (in.before - in.u0) * gates.forget;
  const S h = in.x + (activate<Tanh>(after) - in.x) * (gates.output * unit.dropout);
  return {h, after};
}

// Gradients of what a step reads; `u1` and `u2` are at the gates' logits, and so serve the biases too.
template <typename S>
struct Gradients {
  S u0, u1, u2, x, before;
};

// `grad_after` is the gradient at c' with all that later steps give it; `after` is c', as the forward pass kept it.
template <bool Tanh, typename S>
HFE_INLINE Gradients<S> backward_step(
    const Unit<S>& unit, const Inputs<S>& in, S after, S grad_h, S grad_after) {
  const Gates<S> gates = gates_of(unit, in);
  const S activated = activate<Tanh>(after);
  const S dropped = grad_h * unit.dropout;
  const S through = dropped * gates.output;
  S grad = grad_after + through;
  if constexpr (Tanh) {
    grad = grad_after + through * (S(1) - activated * activated);
  }
  const S slope = (in.before - in.u0) * (gates.forget * (S(1) - gates.forget));
  const S u1 = grad * slope;
  const S u2 = dropped * (activated - in.x) * (gates.output * (S(1) - gates.output));
  return {grad * (S(1) - gates.forget), u1, u2, grad_h - through,
          grad * gates.forget + u1 * unit.forget_gate_weight + u2 * unit.output_gate_weight};
}

}  // namespace sru
