#pragma once

#include "../include/sru_params.h"

namespace sru {

void forward_cpu(const SruParams& params);
void backward_cpu(const SruBackwardParams& params);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* cpu_capability();

}  // namespace sru
