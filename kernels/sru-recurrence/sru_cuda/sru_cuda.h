#pragma once

#include <cstdint>

#include "../include/sru_params.h"

namespace sru {

// Both start their work on the current stream of the device and do not wait for it.
void forward_cuda(const SruParams& params, int32_t device);
void backward_cuda(const SruBackwardParams& params, int32_t device);

}  // namespace sru
