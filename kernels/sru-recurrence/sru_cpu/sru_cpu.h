#pragma once

#include "../include/sru_problem.h"

namespace sru {

void forward_cpu(const Problem& problem);
void backward_cpu(const BackwardProblem& problem);

// The instruction set in use: "avx512", "avx2" or "baseline".
const char* cpu_capability();

}  // namespace sru
