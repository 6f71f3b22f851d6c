// Rows of weights by the widest instructions that the processor has.

#include "row_functions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convert.h"
#include "cpu_dispatch.h"
#include "sparse_ff_cpu.h"

namespace sparse_ff {
namespace {

using hfe::BFloat16;
using hfe::Capability;
using hfe::Float16;
using hfe::from_bfloat16;
using hfe::from_float16;
using hfe::to_bfloat16;
using hfe::to_float16;

#define HFE_LANES 4
namespace baseline {
#include "lanes.h"
#include "exponential.h"
#include "rows.h"
}
#undef HFE_LANES

#if defined(HFE_HAS_X86_TARGETS)
#define HFE_LANES 8
HFE_BEGIN_TARGET(HFE_AVX2)
namespace avx2 {
#include "lanes.h"
#include "exponential.h"
#include "rows.h"
}
HFE_END_TARGET
#undef HFE_LANES

#define HFE_LANES 16
HFE_BEGIN_TARGET(HFE_AVX512)
namespace avx512 {
#include "lanes.h"
#include "exponential.h"
#include "rows.h"
}
HFE_END_TARGET
#undef HFE_LANES
#endif

// Every instruction set that this build and this processor have, the widest first.
std::vector<Capability<Functions>> available() {
  std::vector<Capability<Functions>> capabilities;
#if defined(HFE_HAS_X86_TARGETS)
  if (hfe::has_avx512()) capabilities.push_back({"avx512", avx512::all_functions()});
  if (hfe::has_avx2()) capabilities.push_back({"avx2", avx2::all_functions()});
#endif
  capabilities.push_back({"baseline", baseline::all_functions()});
  return capabilities;
}

const Capability<Functions>& chosen() {
  static const Capability<Functions> choice = hfe::choose_capability(available(), "SPARSE_FF_CPU_CAPABILITY");
  return choice;
}

}  // namespace

const Functions& functions() { return chosen().functions; }

const char* cpu_capability() { return chosen().name; }

}  // namespace sparse_ff
