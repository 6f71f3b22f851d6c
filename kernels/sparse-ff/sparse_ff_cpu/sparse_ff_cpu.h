#pragma once

#include "../include/sparse_ff_params.h"

namespace sparse_ff {

void forward_cpu(const SparseFfParams& params);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* cpu_capability();

}  // namespace sparse_ff
