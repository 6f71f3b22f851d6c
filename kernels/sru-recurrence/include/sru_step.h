// The mathematics of `sru_cell.h`, for any kind of number S: float and double, and on a CPU the lanes of `lanes.h`, for
// which it is included again for each instruction set. Included inside a namespace.

#include "exponential.h"

HFE_INLINE double reciprocal(double x) { return 1.0 / x; }

template <typename S>
HFE_INLINE S reciprocal(S x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, x);
#else
  return S(1.0f) / x;
#endif
}

template <typename S>
struct Gates {
  S forget, output;
};

// 1 + e^-x, one over which is the sigmoid.
HFE_INLINE double denominator(double x) { return 1.0 + exp(-x); }

template <typename S>
HFE_INLINE S denominator(S x) {
#if defined(__CUDA_ARCH__)
  return S(1) + exponential(-x);
#else
  return S(1.0f) + exponential(-at_least(at_most(x, S(87.0f)), S(-87.0f)));
#endif
}

// Both sigmoids from their denominators. One division for both and three products are no faster where divisions overlap
// with other work, and a NaN of one gate would reach the other.
template <typename S>
HFE_INLINE Gates<S> gates_of(const Gates<S>& denominators) {
  return {reciprocal(denominators.forget), reciprocal(denominators.output)};
}

HFE_INLINE double hyperbolic_tangent(double x) { return tanh(x); }

// Near 0, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial; both are computed and one is taken.
template <typename S>
HFE_INLINE S hyperbolic_tangent(S x) {
  const S size = magnitude(x), square = x * x;
  S p = S(-5.70498872745e-3f);
  p = p * square + S(2.06390887954e-2f);
  p = p * square - S(5.37397155531e-2f);
  p = p * square + S(1.33314422036e-1f);
  p = p * square - S(3.33332819422e-1f);
  const S near = p * square * x + x;
  const S far = S(1.0f) - S(2.0f) * reciprocal(exponential(S(2.0f) * at_most(size, S(40.0f))) + S(1.0f));
  return where_less(size, S(0.625f), near, with_sign(far, x));
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

// The bias is added to what does not wait for the step before: one operation less on the chain of dependent ones.
template <typename S>
HFE_INLINE Gates<S> denominators_of(const Unit<S>& unit, S u1, S u2, S before) {
  return {denominator(before * unit.forget_gate_weight + (u1 + unit.forget_gate_bias)),
          denominator(before * unit.output_gate_weight + (u2 + unit.output_gate_bias))};
}

template <typename S>
HFE_INLINE Gates<S> gates_of(const Unit<S>& unit, const Inputs<S>& in) {
  return gates_of(denominators_of(unit, in.u1, in.u2, in.before));
}

template <typename S>
struct Outputs {
  S h, after;
};

template <bool Tanh, typename S>
HFE_INLINE Outputs<S> forward_step(const Unit<S>& unit, const Inputs<S>& in, const Gates<S>& gates) {
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
    const Unit<S>& unit, const Inputs<S>& in, const Gates<S>& gates, S after, S grad_h, S grad_after) {
  const S activated = activate<Tanh>(after);
  const S dropped = grad_h * unit.dropout;
  const S through = dropped * gates.output;
  S grad = grad_after + through;
  if constexpr (Tanh) {
    grad = grad_after + through * (S(1.0f) - activated * activated);
  }
  const S forgotten = grad * gates.forget, opposite = S(1.0f) - gates.forget;
  const S u1 = forgotten * (opposite * (in.before - in.u0));
  const S u2 = through * ((S(1.0f) - gates.output) * (activated - in.x));
  return {grad * opposite, u1, u2, grad_h - through,
          forgotten + u1 * unit.forget_gate_weight + u2 * unit.output_gate_weight};
}
