#include "../torch-ext/torch_binding.h"
#include "factor.h"
#include "tensor_view.h"

void scale(torch::stable::Tensor x) {
  const hfe::TensorView view{x.data_ptr()};
  float* values = static_cast<float*>(view.data);
  for (int64_t i = 0; i < x.numel(); ++i) values[i] *= FACTOR;
}
