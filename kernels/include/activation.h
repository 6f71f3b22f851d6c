// Activations of feed-forward layers, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace hfe {

enum class Activation : int32_t { relu, gelu, gelu_new, silu };

// A sum that ReLU does not let through gives exactly 0; NaN passes.
HFE_INLINE float activate(float sum, Activation activation) {
  if (activation == Activation::relu) return sum < 0.0f ? 0.0f : sum;
  if (activation == Activation::gelu) return 0.5f * sum * (1.0f + erff(sum * 0.70710678f));
  if (activation == Activation::silu) return sum / (1.0f + expf(-sum));
  return 0.5f * sum * (1.0f + tanhf(0.79788456f * (sum + 0.044715f * sum * sum * sum)));
}

}  // namespace hfe
