#include "../torch-ext/torch_binding.h"
#include "factor.h"

void scale(torch::stable::Tensor x) {
  float* values = static_cast<float*>(x.data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) values[i] *= FACTOR;
}
