// What the host's and the device's compiler share: functions that both inline, and a look at a value's bits.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#define HFE_INLINE __host__ __device__ __forceinline__
#else
#define HFE_INLINE inline __attribute__((always_inline))
#endif

// After the parameters of a lambda, which does not take HFE_INLINE.
#define HFE_INLINED __attribute__((always_inline))

namespace hfe {

template <typename To, typename From>
HFE_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "both types must have the same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace hfe
