#pragma once

#include "../include/sru_problem.h"

namespace sru {

void forward_cpu(const Problem& problem);
void backward_cpu(const BackwardProblem& problem);

// The instructions that the processor is driven by: "avx512", "avx2" or "baseline".
const char* instruction_set();

}  // namespace sru
