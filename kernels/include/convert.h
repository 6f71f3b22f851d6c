// bfloat16 and float16. On the host bit by bit and without branches, so that loops over them become vector code on any
// CPU; on the device by the instructions for it.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"

namespace hfe {

HFE_INLINE float from_bfloat16(uint16_t bits) { return same_bits<float>(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even; NaN becomes a quiet NaN.
HFE_INLINE uint16_t to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = same_bits<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

HFE_INLINE float from_float16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  // The exponents' biases differ by 112. A product, unlike a sum of bits, is right for subnormal numbers too.
  const uint32_t finite = same_bits<uint32_t>(same_bits<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return same_bits<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// To the nearest, ties to even; what is too large becomes infinite, NaN a quiet NaN.
HFE_INLINE uint16_t to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = same_bits<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the last place is worth 2^-24: adding 0.5 lets the float unit round to it.
  const uint32_t subnormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : small));
#endif
}

// Elements as they lie in memory; kernels compute with what `widen` makes of them.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

HFE_INLINE float widen(float value) { return value; }
HFE_INLINE double widen(double value) { return value; }
HFE_INLINE float widen(BFloat16 value) { return from_bfloat16(value.bits); }
HFE_INLINE float widen(Float16 value) { return from_float16(value.bits); }

template <typename T, typename S>
HFE_INLINE T narrow(S value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {to_bfloat16(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {to_float16(static_cast<float>(value))};
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace hfe
