#pragma once
#include <torch/csrc/stable/tensor.h>
void scale(torch::stable::Tensor x);
