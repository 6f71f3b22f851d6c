#pragma once

#include <cstdint>

#include "../include/sparse_ff_params.h"

namespace sparse_ff {

// Starts its work on the current stream of the device and does not wait for it. Both matrices of the controller must have
// one dtype, and so must `up` and `down`.
void forward_cuda(const SparseFfParams& params, int32_t device);

}  // namespace sparse_ff
