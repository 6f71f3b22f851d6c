// The op that Python sees: checks of what is given, room for the results, and the call of the backend.
// What it means is said in sparse_ff/__init__.py.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "registration.h"
#include "tensor_checks.h"

#if defined(CUDA_KERNEL)
#include "../sparse_ff_cuda/sparse_ff_cuda.h"
#define SPARSE_FF_BACKEND CUDA
#else
#include "../sparse_ff_cpu/sparse_ff_cpu.h"
#define SPARSE_FF_BACKEND CPU
#endif

namespace {

using hfe::check_shape;
using hfe::DType;
using hfe::has_contiguous_rows;
using hfe::ScalarType;
using hfe::Shape;
using hfe::Tensor;
using hfe::TensorView;
using hfe::text_of;
using sparse_ff::Activation;
using sparse_ff::SparseFfParams;

void check_dimensions(const Tensor& tensor, size_t count, const char* name, const char* shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == count, name, " must have shape ", shape, ", not ",
                  text_of(sizes.data(), sizes.size()), ".");
}

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new") return Activation::gelu_new;
  STD_TORCH_CHECK(name == "silu", "activation must be relu, gelu, gelu_new or silu, not ", name, ".");
  return Activation::silu;
}

// A weight, which is never copied: that would read all of it.
TensorView weight(const Tensor& tensor, const Shape& shape, const Tensor& x, const char* name) {
  hfe::check_device(tensor, x, name, "x");
  check_shape(tensor, shape, name);
  STD_TORCH_CHECK(has_contiguous_rows(tensor), name,
                  " must be contiguous in its last dimension: give it as it lies in memory, or `contiguous()`.");
  TensorView view;
  view.data = tensor.data_ptr();
  view.dtype = hfe::dtype_of(tensor, name);
  STD_TORCH_CHECK(view.dtype != DType::float64, name, " must be float32, bfloat16 or float16, not Double.");
  // The stride of a last dimension is 1 wherever it is read.
  if (shape.size() > 1) view.batch_stride = tensor.stride(0);
  if (shape.size() > 2) view.step_stride = tensor.stride(1);
  return view;
}

// Rows that may be copied: `kept` keeps the copy alive.
TensorView input(const Tensor& x, Tensor& kept) {
  if (!has_contiguous_rows(x)) kept = torch::stable::contiguous(x);
  return weight(kept, {x.size(0), x.size(1)}, x, "x");
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor controller_down, Tensor controller_up, Tensor controller_bias,
                                   Tensor up, Tensor down, std::optional<Tensor> bias,
                                   std::optional<Tensor> inner_bias, std::string activation,
                                   bool multiply_by_controller) {
  check_dimensions(x, 2, "x", "(tokens, width)");
  check_dimensions(controller_up, 3, "controller_up", "(blocks, block_size, rank)");
  SparseFfParams params;
  params.tokens = x.size(0);
  params.width = x.size(1);
  params.blocks = controller_up.size(0);
  params.units = controller_up.size(1);
  params.rank = controller_up.size(2);
  const int64_t width = params.width, blocks = params.blocks, units = params.units, rank = params.rank;
  STD_TORCH_CHECK(width > 0 && blocks > 0 && units > 0 && rank > 0, "No dimension but that of tokens may be 0; the "
                  "width is ", width, ", and controller_up has shape (", blocks, ", ", units, ", ", rank, ").");
  STD_TORCH_CHECK(units <= std::numeric_limits<int32_t>::max(), "A block has too many units.");
  Tensor kept = x;
  params.x = input(x, kept);
  params.controller_down = weight(controller_down, {rank, width}, x, "controller_down");
  params.controller_up = weight(controller_up, {blocks, units, rank}, x, "controller_up");
  params.controller_bias = weight(controller_bias, {blocks, units}, x, "controller_bias");
  params.up = weight(up, {blocks, units, width}, x, "up");
  params.down = weight(down, {blocks, units, width}, x, "down");
  if (bias) params.bias = weight(*bias, {width}, x, "bias");
  if (inner_bias) params.inner_bias = weight(*inner_bias, {blocks, units}, x, "inner_bias");
  params.activation = activation_of(activation);
  params.multiply_by_controller = multiply_by_controller;
  Tensor y = torch::stable::new_empty(x, {params.tokens, width});
  Tensor winners = torch::stable::new_empty(x, {params.tokens, blocks}, ScalarType::Int);
  params.y = weight(y, {params.tokens, width}, x, "y");
  params.winners = static_cast<int32_t*>(winners.data_ptr());
#if defined(CUDA_KERNEL)
  STD_TORCH_CHECK(params.controller_down.dtype == params.controller_up.dtype && params.up.dtype == params.down.dtype,
                  "On a GPU controller_down and controller_up must have one dtype, and so must up and down.");
  // Hidden values of the controller, and what each winner gives.
  Tensor room = torch::stable::new_empty(x, {params.tokens, rank + blocks}, ScalarType::Float);
  params.h = static_cast<float*>(room.data_ptr());
  params.hidden = params.h + params.tokens * rank;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  sparse_ff::forward_cuda(params, x.get_device_index());
#else
  sparse_ff::forward_cpu(params);
#endif
  return {y, winners};
}

}  // namespace

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("forward(Tensor x, Tensor controller_down, Tensor controller_up, Tensor controller_bias, Tensor up, "
          "Tensor down, Tensor? bias, Tensor? inner_bias, str activation, bool multiply_by_controller) "
          "-> (Tensor, Tensor)");
#if defined(CPU_KERNEL)
  ops.def("cpu_capability() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, SPARSE_FF_BACKEND, ops) {
  ops.impl("forward", TORCH_BOX(&forward));
}

#if defined(CPU_KERNEL)
std::string cpu_capability() { return sparse_ff::cpu_capability(); }

// It takes no tensor, whose device would tell the backend.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
