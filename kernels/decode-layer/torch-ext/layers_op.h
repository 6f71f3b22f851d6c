#pragma once

#include <optional>
#include <vector>

#include "tensor_checks.h"

// Attentions and feed-forward layers one after the other; see decode_layer/layers.py.
void layers(hfe::Tensor hidden, std::vector<hfe::Tensor> keys, std::vector<hfe::Tensor> values,
            std::vector<hfe::Tensor> states, std::optional<hfe::Tensor> mask, std::vector<hfe::Tensor> weights,
            std::vector<int64_t> settings, std::vector<double> epsilons, std::vector<int64_t> filled,
            std::optional<hfe::Tensor> second, std::vector<hfe::Tensor> source_keys,
            std::vector<hfe::Tensor> source_values, std::optional<hfe::Tensor> cross_mask,
            std::vector<hfe::Tensor> buckets, std::vector<hfe::Tensor> source_buckets);
