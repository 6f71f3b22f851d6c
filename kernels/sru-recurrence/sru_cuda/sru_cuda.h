#pragma once

#include <cstdint>

#include "../include/sru_problem.h"

namespace sru {

// Both start their work on the current stream of the device and do not wait for it.
void forward_cuda(const Problem& problem, int32_t device);
void backward_cuda(const BackwardProblem& problem, int32_t device);

}  // namespace sru
