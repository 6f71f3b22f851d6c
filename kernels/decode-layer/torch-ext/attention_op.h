#pragma once

#include <optional>
#include <vector>

#include "tensor_checks.h"

// The op `attention`; see decode_layer/layers.py.
void attention(hfe::Tensor hidden, hfe::Tensor keys, hfe::Tensor values, std::optional<hfe::Tensor> state,
               std::optional<hfe::Tensor> mask, std::vector<hfe::Tensor> weights, std::vector<int64_t> settings,
               double epsilon, int64_t filled);
