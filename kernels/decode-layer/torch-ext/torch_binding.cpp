// The ops that Python sees: checks of what is given, room for results, and the calls. What they mean is said in
// decode_layer/__init__.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "../decode_layer_cpu/matrix.h"
#include "../decode_layer_cpu/tensors.h"
#include "attention_op.h"
#include "registration.h"

namespace {

using decode_layer::FloatRows;
using decode_layer::Inputs;
using decode_layer::Matrix;
using decode_layer::Numbers;
using hfe::Tensor;

// Rows that may be copied.
Tensor with_contiguous_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have shape (tokens, width), not ",
                  hfe::text_of(x.sizes().data(), x.sizes().size()), ".");
  return hfe::has_contiguous_rows(x) ? x : torch::stable::contiguous(x);
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> scales, std::optional<Tensor> bias) {
  x = with_contiguous_rows(x, "x");
  const int64_t rows = weight.size(0), width = x.size(1);
  const Matrix matrix = decode_layer::matrix_of(weight, scales, {rows}, width, "weight");
  const Numbers added = decode_layer::numbers_of(bias, rows, "bias");
  Tensor y = torch::stable::new_empty(x, {x.size(0), rows});
  if (x.size(0) == 0) return y;
  FloatRows from(x, "x"), to(y, "y");
  const float* const numbers = from.read();
  Inputs inputs(numbers, from.stride(), x.size(0), width);
  decode_layer::multiply(matrix, inputs, to.numbers(), to.stride());
  decode_layer::add_bias(added, rows, to.numbers(), to.stride(), x.size(0));
  to.write();
  return y;
}

std::string cpu_capability() { return decode_layer::cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor");
  ops.def("attention(Tensor(a!) hidden, Tensor(b!) keys, Tensor(c!) values, Tensor(d!)? state, Tensor? mask, "
          "Tensor[] weights, int[] settings, float epsilon, int filled) -> ()");
  ops.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("linear", TORCH_BOX(&linear));
  ops.impl("attention", TORCH_BOX(&attention));
}

// It takes no tensor, whose device would tell the backend.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
