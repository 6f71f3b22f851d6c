// A kernel's loops, compiled once for each instruction set, and the list of what came of it. To be included after
// convert.h and cpu_dispatch.h and inside the unnamed namespace of the kernel; HFE_LOOPS is the header of its loops,
// which includes lanes.h and whatever else they need, and in which `all_functions()` returns them. With HFE_WITH_VNNI
// there is one more instruction set, for whose loops HFE_VNNI is defined.

using hfe::BFloat16;
using hfe::Float16;
using hfe::from_bfloat16;
using hfe::from_float16;
using hfe::to_bfloat16;
using hfe::to_float16;

#define HFE_LANES 4
namespace baseline {
#include HFE_LOOPS
}
#undef HFE_LANES

#if defined(HFE_HAS_X86_TARGETS)
#define HFE_LANES 8
HFE_BEGIN_TARGET(HFE_AVX2)
namespace avx2 {
#include HFE_LOOPS
}
HFE_END_TARGET
#undef HFE_LANES

#define HFE_LANES 16
HFE_BEGIN_TARGET(HFE_AVX512)
namespace avx512 {
#include HFE_LOOPS
}
HFE_END_TARGET

#if defined(HFE_WITH_VNNI)
#define HFE_VNNI
HFE_BEGIN_TARGET(HFE_AVX512_VNNI)
namespace avx512_vnni {
#include HFE_LOOPS
}
HFE_END_TARGET
#undef HFE_VNNI
#endif
#undef HFE_LANES
#endif

using LoopsCapability = hfe::Capability<decltype(baseline::all_functions())>;

// Every instruction set that this build and this processor have, the widest first.
std::vector<LoopsCapability> available() {
  std::vector<LoopsCapability> capabilities;
#if defined(HFE_HAS_X86_TARGETS)
#if defined(HFE_WITH_VNNI)
  if (hfe::has_avx512_vnni()) capabilities.push_back({"avx512_vnni", avx512_vnni::all_functions()});
#endif
  if (hfe::has_avx512()) capabilities.push_back({"avx512", avx512::all_functions()});
  if (hfe::has_avx2()) capabilities.push_back({"avx2", avx2::all_functions()});
#endif
  capabilities.push_back({"baseline", baseline::all_functions()});
  return capabilities;
}

#undef HFE_LOOPS
