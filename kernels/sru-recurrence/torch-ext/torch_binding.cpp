// The ops that Python sees: checks of what is given, room for the results, and the call of the backend.
// What they mean is said in sru_recurrence/__init__.py.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kept_memory.h"
#include "registration.h"
#include "tensor_checks.h"

#if defined(CUDA_KERNEL)
#include "../sru_cuda/sru_cuda.h"
#define SRU_BACKEND CUDA
#else
#include "../sru_cpu/sru_cpu.h"
#define SRU_BACKEND CPU
#endif

namespace {

using hfe::check_shape;
using hfe::dtype_of;
using hfe::has_contiguous_rows;
using hfe::room_like;
using hfe::ScalarType;
using hfe::Shape;
using hfe::Tensor;
using hfe::text_of;
using hfe::view_of;
using sru::BoolView;
using sru::DType;
using sru::SruBackwardParams;
using sru::SruParams;
using sru::TensorView;

ScalarType type_of(DType dtype) { return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }

void check_device(const Tensor& tensor, const Tensor& u, const char* name) { hfe::check_device(tensor, u, name, "u"); }

// The arguments that both passes share, as the schema orders them.
struct Arguments {
  Tensor u;
  std::optional<Tensor> x, weight_c, bias, c0, mask, document_start, dropout_mask;
  double scale_x;
  std::string activation;
  bool reverse;
};

// Makes the parameters of a call from tensors, and keeps alive what had to be converted for it.
class ParamsBuilder {
 public:
  ParamsBuilder(const Arguments& given, SruParams& params) : u_(given.u), params_(params) {
    check_u();
    params.tanh = given.activation == "tanh";
    STD_TORCH_CHECK(params.tanh || given.activation == "identity", "activation must be identity or tanh, not ",
                    given.activation, ".");
    STD_TORCH_CHECK(!(params.parts == 4 && given.x), "With four parts the highway input is the fourth of u: give no x.");
    params.scale_x = given.scale_x;
    params.reverse = given.reverse;
    params.u = read_only(given.u, "u");
    if (given.x) params.x = input(*given.x, sequence(), "x");
    params.weight_c = parameter(given.weight_c, {2, params.width}, "weight_c");
    params.bias = parameter(given.bias, {2, params.width}, "bias");
    params.c0 = parameter(given.c0, {params.batch, params.width}, "c0");
    params.dropout = parameter(given.dropout_mask, {params.batch, params.width}, "dropout_mask");
    params.mask = flags(given.mask, "mask");
    params.document_start = flags(given.document_start, "document_start");
  }

  Shape sequence() const { return {params_.batch, params_.length, params_.width}; }
  Shape all_states() const { return {params_.batch, params_.length + 1, params_.width}; }
  DType state_dtype() const { return params_.u.dtype == DType::float64 ? DType::float64 : DType::float32; }
  ScalarType state_type() const { return type_of(state_dtype()); }

  TensorView input(const Tensor& tensor, const Shape& shape, const char* name) {
    check_device(tensor, u_, name);
    check_shape(tensor, shape, name);
    return read_only(tensor, name);
  }

  // What the op writes to must be as it is: a copy would get the results.
  TensorView output(const Tensor& tensor, const Shape& shape, const char* name) const {
    check_device(tensor, u_, name);
    check_shape(tensor, shape, name);
    STD_TORCH_CHECK(tensor.size(0) <= 1 || tensor.stride(0) != 0, name, " must have room for each row of the batch.");
    return view_of(tensor, name);
  }

  TensorView states(const Tensor& tensor) const {
    const TensorView view = output(tensor, all_states(), "states");
    STD_TORCH_CHECK(view.dtype == state_dtype(),
                    "states must have the state's dtype, float64 with float64 u, else float32.");
    return view;
  }

  // A contiguous result in the state's dtype.
  void* total(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) const {
    if (!tensor) return nullptr;
    check_device(*tensor, u_, name);
    check_shape(*tensor, shape, name);
    STD_TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == state_type(), name,
                    " must be contiguous and have the state's dtype.");
    return tensor->data_ptr();
  }

 private:
  void check_u() {
    const auto sizes = u_.sizes();
    STD_TORCH_CHECK(sizes.size() == 4 && (sizes[2] == 3 || sizes[2] == 4),
                    "u must have shape (batch, length, 3 or 4, width), not ", text_of(sizes.data(), sizes.size()), ".");
    STD_TORCH_CHECK(sizes[1] > 0, "The recurrence needs at least one step; u has length 0.");
    params_.batch = sizes[0];
    params_.length = sizes[1];
    params_.parts = sizes[2];
    params_.width = sizes[3];
  }

  TensorView read_only(const Tensor& tensor, const char* name) {
    if (has_contiguous_rows(tensor)) return view_of(tensor, name);
    kept_.push_back(torch::stable::contiguous(tensor));
    return view_of(kept_.back(), name);
  }

  const void* parameter(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) {
    if (!tensor) return nullptr;
    check_device(*tensor, u_, name);
    check_shape(*tensor, shape, name);
    dtype_of(*tensor, name);
    if (tensor->scalar_type() == state_type() && tensor->is_contiguous()) return tensor->data_ptr();
    kept_.push_back(torch::stable::contiguous(torch::stable::to(*tensor, state_type())));
    return kept_.back().data_ptr();
  }

  BoolView flags(const std::optional<Tensor>& tensor, const char* name) const {
    if (!tensor) return {};
    check_device(*tensor, u_, name);
    check_shape(*tensor, {params_.batch, params_.length}, name);
    return hfe::bool_view_of(*tensor, name);
  }

  const Tensor u_;
  SruParams& params_;
  std::vector<Tensor> kept_;
};

void run(const SruParams& params, const Tensor& u) {
#if defined(CUDA_KERNEL)
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  sru::forward_cuda(params, u.get_device_index());
#else
  static_cast<void>(u);
  sru::forward_cpu(params);
#endif
}

void run(const SruBackwardParams& params, const Tensor& u) {
#if defined(CUDA_KERNEL)
  const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
  sru::backward_cuda(params, u.get_device_index());
#else
  static_cast<void>(u);
  sru::backward_cpu(params);
#endif
}

void forward_into(Tensor& h, Tensor& states, const Arguments& given) {
  SruParams params;
  ParamsBuilder prepared(given, params);
  params.states = prepared.states(states);
  params.h = prepared.output(h, prepared.sequence(), "h");
  run(params, given.u);
}

// The gradients of one call; those that are not wanted are absent.
struct Results {
  Tensor u;
  std::optional<Tensor> x, weight_c, bias, c0;
};

void backward_into(const Results& results, const std::optional<Tensor>& grad_h,
                   const std::optional<Tensor>& grad_states, const Tensor& states, const Arguments& given) {
  SruBackwardParams params;
  ParamsBuilder prepared(given, params);
  params.states = prepared.input(states, prepared.all_states(), "states");
  STD_TORCH_CHECK(params.states.dtype == prepared.state_dtype() && (params.batch == 0 || params.states.step_stride != 0),
                  "states must be what the forward pass gave: those of all steps, in the state's dtype.");
  if (grad_h) params.grad_h = prepared.input(*grad_h, prepared.sequence(), "grad_h");
  if (grad_states) params.grad_states = prepared.input(*grad_states, prepared.all_states(), "grad_states");
  params.grad_u = prepared.output(results.u, {params.batch, params.length, params.parts, params.width}, "grad_u");
  if (results.x) params.grad_x = prepared.output(*results.x, prepared.sequence(), "grad_x");
  params.grad_weight_c = prepared.total(results.weight_c, {2, params.width}, "grad_weight_c");
  params.grad_bias = prepared.total(results.bias, {2, params.width}, "grad_bias");
  params.grad_c0 = prepared.total(results.c0, {params.batch, params.width}, "grad_c0");
  const Shape size = {std::max<int64_t>(params.batch, 1), 4, params.width};
  Tensor partial = torch::stable::new_empty(given.u, size, prepared.state_type());
  if (params.batch == 0) torch::stable::zero_(partial);
  params.partial = partial.data_ptr();
  run(params, given.u);
}

#define SRU_ARGUMENTS                                                                                            \
  Tensor u, std::optional<Tensor> x, std::optional<Tensor> weight_c, std::optional<Tensor> bias,                  \
      std::optional<Tensor> c0, std::optional<Tensor> mask, std::optional<Tensor> document_start,                          \
      std::optional<Tensor> dropout_mask, double scale_x, std::string activation, bool reverse
#define SRU_GIVEN {u, x, weight_c, bias, c0, mask, document_start, dropout_mask, scale_x, activation, reverse}

void forward_out(Tensor h, Tensor states, SRU_ARGUMENTS) { forward_into(h, states, SRU_GIVEN); }

ScalarType state_type_of(const Tensor& u) {
  return u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor room_for_h(const Tensor& u, const std::optional<Tensor>& x) {
  STD_TORCH_CHECK(u.dim() == 4, "u must have shape (batch, length, 3 or 4, width).");
  return room_like(u, {u.size(0), u.size(1), u.size(3)}, x ? x->scalar_type() : u.scalar_type());
}

std::tuple<Tensor, Tensor> forward(SRU_ARGUMENTS) {
  Tensor h = room_for_h(u, x);
  Tensor states = room_like(u, {u.size(0), u.size(1) + 1, u.size(3)}, state_type_of(u));
  forward_into(h, states, SRU_GIVEN);
  return {h, states};
}

std::tuple<Tensor, Tensor> forward_last(SRU_ARGUMENTS) {
  Tensor h = room_for_h(u, x);
  Tensor last = torch::stable::new_empty(u, {u.size(0), u.size(3)}, state_type_of(u));
  SruParams params;
  const Arguments given SRU_GIVEN;
  ParamsBuilder prepared(given, params);
  params.h = prepared.output(h, prepared.sequence(), "h");
  params.states = hfe::view_of(last, "states");
  params.states.step_stride = 0;  // the states of all steps lie in one place, each over the one before
  run(params, u);
  return {h, last};
}

void backward_out(Tensor grad_u, std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight_c,
                  std::optional<Tensor> grad_bias, std::optional<Tensor> grad_c0, std::optional<Tensor> grad_h,
                  std::optional<Tensor> grad_states, Tensor states, SRU_ARGUMENTS) {
  backward_into({grad_u, grad_x, grad_weight_c, grad_bias, grad_c0}, grad_h, grad_states, states, SRU_GIVEN);
}

// In the dtype that the argument has; empty where it is not given.
Tensor result(const std::optional<Tensor>& grad, const std::optional<Tensor>& argument, const Tensor& states) {
  if (!argument) return torch::stable::new_empty(states, {0});
  return grad->scalar_type() == argument->scalar_type() ? *grad : torch::stable::to(*grad, argument->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_h, std::optional<Tensor> grad_states, Tensor states, SRU_ARGUMENTS) {
  STD_TORCH_CHECK(u.dim() == 4, "u must have shape (batch, length, 3 or 4, width).");
  const int64_t batch = u.size(0), length = u.size(1), parts = u.size(2), width = u.size(3);
  const ScalarType type = states.scalar_type();
  const auto room = [&](const std::optional<Tensor>& argument, Shape shape) {
    return argument ? std::optional<Tensor>(torch::stable::new_empty(u, shape, type)) : std::nullopt;
  };
  Results results{room_like(u, {batch, length, parts, width}, u.scalar_type()), std::nullopt,
                  room(weight_c, {2, width}), room(bias, {2, width}), room(c0, {batch, width})};
  if (x) results.x = room_like(*x, {batch, length, width}, x->scalar_type());
  backward_into(results, grad_h, grad_states, states, SRU_GIVEN);
  return {results.u, result(results.x, x, states), result(results.weight_c, weight_c, states),
          result(results.bias, bias, states), result(results.c0, c0, states)};
}

}  // namespace

#define SRU_SCHEMA                                                                                                \
  "Tensor u, Tensor? x, Tensor? weight_c, Tensor? bias, Tensor? c0, Tensor? mask, Tensor? document_start, "                \
  "Tensor? dropout_mask, float scale_x, str activation, bool reverse"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("forward(" SRU_SCHEMA ") -> (Tensor, Tensor)");
  ops.def("forward_out(Tensor(a!) h, Tensor(b!) states, " SRU_SCHEMA ") -> ()");
  ops.def("forward_last(" SRU_SCHEMA ") -> (Tensor, Tensor)");
  ops.def("backward(Tensor? grad_h, Tensor? grad_states, Tensor states, " SRU_SCHEMA
          ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  ops.def("backward_out(Tensor(a!) grad_u, Tensor(b!)? grad_x, Tensor(c!)? grad_weight_c, Tensor(d!)? grad_bias, "
          "Tensor(e!)? grad_c0, Tensor? grad_h, Tensor? grad_states, Tensor states, " SRU_SCHEMA ") -> ()");
#if defined(CPU_KERNEL)
  ops.def("cpu_capability() -> str");
#endif
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, SRU_BACKEND, ops) {
  ops.impl("forward", TORCH_BOX(&forward));
  ops.impl("forward_out", TORCH_BOX(&forward_out));
  ops.impl("forward_last", TORCH_BOX(&forward_last));
  ops.impl("backward", TORCH_BOX(&backward));
  ops.impl("backward_out", TORCH_BOX(&backward_out));
}

#if defined(CPU_KERNEL)
std::string cpu_capability() { return sru::cpu_capability(); }

// It takes no tensor, whose device would tell the backend.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
