// Rows of weights by the widest instructions that the processor has.

#include "functions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "ahead.h"
#include "convert.h"
#include "cpu_dispatch.h"

namespace decode_layer {
namespace {

using hfe::Activation;
using hfe::Ahead;
using hfe::kAheadBytes;
using hfe::kLine;
using hfe::prefetch;
using hfe::same_bits;
using hfe::touch_lines;

#define HFE_WITH_VNNI
#define HFE_LOOPS "../decode_layer_cpu/loops.h"
#include "every_instruction_set.h"

const LoopsCapability& chosen() {
  static const LoopsCapability choice = hfe::choose_capability(available(), "DECODE_LAYER_CPU_CAPABILITY");
  return choice;
}

}  // namespace

const Functions& functions() { return chosen().functions; }

const char* cpu_capability() { return chosen().name; }

}  // namespace decode_layer
