// The choice of an instruction set at run time. A kernel's loops stand in headers that every_instruction_set.h includes
// once for each instruction set, in a namespace of its own and between HFE_BEGIN_TARGET and HFE_END_TARGET; such headers
// include nothing but one another.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HFE_PRAGMA(text) _Pragma(#text)

#if defined(__x86_64__)
#define HFE_HAS_X86_TARGETS 1
#if defined(__clang__)
#define HFE_BEGIN_TARGET(names) HFE_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define HFE_END_TARGET _Pragma("clang attribute pop")
#define HFE_PREFER_WIDE ""
#else
#define HFE_BEGIN_TARGET(names) _Pragma("GCC push_options") HFE_PRAGMA(GCC target(names))
#define HFE_END_TARGET _Pragma("GCC pop_options")
#define HFE_PREFER_WIDE ",prefer-vector-width=512"
#endif
// Every processor with AVX2 has F16C.
#define HFE_AVX2 "avx2,fma,f16c"
#define HFE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c" HFE_PREFER_WIDE
#define HFE_AVX512_VNNI "avx512vnni," HFE_AVX512
#endif

namespace hfe {

inline bool has_avx2() {
#if defined(HFE_HAS_X86_TARGETS)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

inline bool has_avx512() {
#if defined(HFE_HAS_X86_TARGETS)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

// Whether sums of products of 8-bit integers are one instruction, beyond what `has_avx512` asks for.
inline bool has_avx512_vnni() {
#if defined(HFE_HAS_X86_TARGETS)
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// A kernel's functions for one instruction set: "avx512_vnni", "avx512", "avx2" or "baseline".
template <typename Functions>
struct Capability {
  const char* name;
  Functions functions;
};

// The first of `available`, or the one that the environment variable names, so that tests can reach each.
template <typename Functions>
Capability<Functions> choose_capability(const std::vector<Capability<Functions>>& available, const char* variable) {
  const char* wanted = std::getenv(variable);
  if (wanted == nullptr) return available.front();
  std::string names;
  for (const Capability<Functions>& capability : available) {
    if (std::strcmp(capability.name, wanted) == 0) return capability;
    names += names.empty() ? capability.name : std::string(", ") + capability.name;
  }
  STD_TORCH_CHECK(false, variable, " is ", wanted, ", but here it is one of ", names, ".");
}

}  // namespace hfe
