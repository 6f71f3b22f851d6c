#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

// hidden += layer(norm(hidden)), in place; see decode_layer/layers.py.
void feed_forward(torch::stable::Tensor hidden, std::vector<torch::stable::Tensor> weights,
                  std::vector<int64_t> settings, double epsilon);
