// What every step of the recurrence must wait for, and nothing else: from a state to the next, with the forget gate
// between them. Nothing is loaded or written at a step, and a unit's output gate and h are left out.
//
//     c' = u0 + (c - u0) / (1 + 2^(w c + b))      w, b: weight and logit of the gate, times -log2 e
//
// The gate's exponential and quotient are the processor's own approximations, one instruction each. Shorter would be its
// hyperbolic tangent alone, which is exact to 11 bits only.

#include <cuda_runtime.h>

__global__ void chain(float* state, float u0, float weight, float logit, int steps) {
  float c = state[threadIdx.x];
#pragma unroll 16
  for (int step = 0; step < steps; ++step) {
    float power, gate;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmaf_rn(weight, c, logit)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(gate) : "f"(__fadd_rn(1.0f, power)));
    c = __fmaf_rn(__fsub_rn(c, u0), gate, u0);
  }
  state[threadIdx.x] = c;
}

// `steps` steps of 32 columns, from and to `state`; returns CUDA's error code. What is multiplied is an argument, so
// that no compiler can do a step without it.
extern "C" int start_chain(float* state, float u0, float weight, float logit, int steps, void* stream) {
  chain<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(state, u0, weight, logit, steps);
  return static_cast<int>(cudaGetLastError());
}
