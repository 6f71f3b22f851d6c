// Rows of weights by the widest instructions that the processor has.

#include "row_functions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "cpu_dispatch.h"
#include "sparse_ff_cpu.h"

namespace sparse_ff {
namespace {

#define HFE_LOOPS "../sparse_ff_cpu/loops.h"
#include "every_instruction_set.h"

const LoopsCapability& chosen() {
  static const LoopsCapability choice = hfe::choose_capability(available(), "SPARSE_FF_CPU_CAPABILITY");
  return choice;
}

}  // namespace

const Functions& functions() { return chosen().functions; }

const char* cpu_capability() { return chosen().name; }

}  // namespace sparse_ff
