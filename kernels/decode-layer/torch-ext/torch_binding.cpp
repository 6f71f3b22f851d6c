// The ops that Python sees: checks of what is given, room for results, and the calls. What they mean is said in
// decode_layer/__init__.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../decode_layer_cpu/matrix.h"
#include "../decode_layer_cpu/projection.h"
#include "../decode_layer_cpu/parallel.h"
#include "../decode_layer_cpu/tensors.h"
#include "attention_op.h"
#include "feed_forward_op.h"
#include "layers_op.h"
#include "registration.h"

namespace {

using decode_layer::WidenedRows;
using decode_layer::Inputs;
using decode_layer::Matrix;
using decode_layer::Numbers;
using decode_layer::Projection;
using decode_layer::Room;
using decode_layer::SparseFeedForward;
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
  WidenedRows from(x, "x"), to(y, "y");
  const float* const numbers = from.read();
  Inputs inputs(numbers, from.stride(), x.size(0), width);
  decode_layer::multiply(matrix, inputs, to.numbers(), to.stride());
  decode_layer::add_bias(added, rows, to.numbers(), to.stride(), x.size(0));
  to.write();
  return y;
}

Tensor multiplicative(Tensor x, Tensor gating, std::optional<Tensor> gating_scales, Tensor projection,
                      std::optional<Tensor> projection_scales, std::optional<Tensor> bias) {
  x = with_contiguous_rows(x, "x");
  const Projection layer =
      decode_layer::multiplicative_of(gating, gating_scales, projection, projection_scales, bias, x.size(1));
  const int64_t tokens = x.size(0), outputs = layer.outputs();
  Tensor y = torch::stable::new_empty(x, {tokens, outputs});
  WidenedRows from(x, "x"), to(y, "y");
  const float* const numbers = from.read();
  decode_layer::for_each_part(tokens, x.size(1) * outputs, [&](int64_t first, int64_t last) {
    Inputs inputs(numbers + first * from.stride(), from.stride(), last - first, x.size(1));
    hfe::Ahead nothing;
    decode_layer::multiplicative(layer, inputs, to.numbers() + first * to.stride(), to.stride(), nothing);
  });
  to.write();
  return y;
}

// Images of modules of so many bytes are worked on together.
constexpr int64_t kImageBytes = 1 << 18;

Tensor module_conv(Tensor windows, Tensor kernel, std::optional<Tensor> scales, std::optional<Tensor> bias,
                   int64_t window, int64_t width) {
  const bool in_pieces = windows.dim() == 5;
  STD_TORCH_CHECK(in_pieces || windows.dim() == 4, "windows must have shape (batch, length + window - 1, modules, "
                  "channels) or (batch, length, window, modules, channels), not ",
                  hfe::text_of(windows.sizes().data(), windows.sizes().size()), ".");
  windows = torch::stable::contiguous(windows);
  const int64_t batch = windows.size(0), modules = windows.size(-2), channels = windows.size(-1);
  const int64_t length = in_pieces ? windows.size(1) : windows.size(1) - window + 1;
  STD_TORCH_CHECK(length >= 0 && (!in_pieces || windows.size(2) == window), "windows holds fewer tokens than window, ",
                  window, ".");
  const Projection conv = decode_layer::convolution_of(kernel, scales, bias, kernel.size(0), channels, window, width);
  const int64_t tokens = batch * length, row = modules * channels, outputs = modules * conv.outputs();
  Tensor y = torch::stable::new_empty(windows, {batch, length, outputs});
  if (tokens * outputs == 0) return y;
  const int64_t held = windows.numel() / row;
  Tensor rows = torch::stable::view(windows, {held, row}), results = torch::stable::view(y, {tokens, outputs});
  WidenedRows from(rows, "windows"), to(results, "y");
  const float* const numbers = from.read();
  const int64_t image = window * width * channels;
  const int64_t together = std::max<int64_t>(1, kImageBytes / (4 * modules * image));
  const int64_t parts = (tokens + together - 1) / together;
  decode_layer::for_each_part(parts, together * outputs * image, [&](int64_t first, int64_t last) {
    const Room<float> images(together * modules * image);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * together, count = std::min(together, tokens - begin);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t token = begin + t;
        const int64_t start = in_pieces ? token * window : token / length * (length + window - 1) + token % length;
        decode_layer::write_images(conv, numbers + start * row, window, row, images + t * modules * image);
      }
      Inputs inputs(images, image, count * modules, image);
      float* const out = to.numbers() + begin * outputs;
      decode_layer::multiply_rows(conv.matrix, 0, conv.outputs(), inputs.operands(conv.matrix.format), out,
                                  conv.outputs());
      decode_layer::add_bias(conv.bias, conv.outputs(), out, conv.outputs(), count * modules);
    }
  });
  to.write();
  return y;
}

std::tuple<Tensor, Tensor> sparse_feed_forward(
    Tensor x, Tensor controller_down, std::optional<Tensor> controller_down_scales, Tensor controller_up,
    std::optional<Tensor> controller_up_scales, Tensor controller_bias, Tensor units, std::optional<Tensor> bias,
    std::optional<Tensor> inner_bias, std::string activation, bool multiply_by_controller) {
  x = with_contiguous_rows(x, "x");
  STD_TORCH_CHECK(units.dim() == 3 && controller_down.dim() == 2,
                  "units must have shape (blocks, units, bytes) and controller_down (rank, width).");
  SparseFeedForward layer;
  const int64_t width = x.size(1), rank = controller_down.size(0), tokens = x.size(0);
  layer.blocks = units.size(0);
  layer.units = units.size(1);
  decode_layer::check_dimensions(layer, width, rank);
  const int64_t count = layer.blocks * layer.units;
  layer.controller_down =
      decode_layer::matrix_of(controller_down, controller_down_scales, {rank}, width, "controller_down");
  layer.controller_up = decode_layer::matrix_of(controller_up, controller_up_scales, {layer.blocks, layer.units}, rank,
                                                "controller_up");
  layer.controller_bias = decode_layer::numbers_of(controller_bias, count, "controller_bias");
  decode_layer::read_records(layer, units, width);
  layer.bias = decode_layer::numbers_of(bias, width, "bias");
  layer.inner_bias = decode_layer::numbers_of(inner_bias, count, "inner_bias");
  layer.activation = decode_layer::activation_of(activation);
  layer.multiply_by_controller = multiply_by_controller;
  Tensor y = torch::stable::new_empty(x, {tokens, width});
  Tensor winners = torch::stable::new_empty(x, {tokens, layer.blocks}, hfe::ScalarType::Int);
  WidenedRows from(x, "x"), to(y, "y");
  Inputs inputs(from.read(), from.stride(), tokens, width);
  float* const results = to.numbers();
  std::fill_n(results, tokens * width, 0.0f);
  decode_layer::add_feed_forward(layer, inputs, results, to.stride(), static_cast<int32_t*>(winners.data_ptr()));
  to.write();
  return {y, winners};
}

std::string cpu_capability() { return decode_layer::cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor");
  ops.def("multiplicative(Tensor x, Tensor gating, Tensor? gating_scales, Tensor projection, "
          "Tensor? projection_scales, Tensor? bias) -> Tensor");
  ops.def("module_conv(Tensor windows, Tensor kernel, Tensor? scales, Tensor? bias, int window, int width) -> Tensor");
  ops.def("attention(Tensor(a!) hidden, Tensor(b!) keys, Tensor(c!) values, Tensor(d!)? state, Tensor? mask, "
          "Tensor[] weights, int[] settings, float epsilon, int filled) -> ()");
  ops.def("sparse_feed_forward(Tensor x, Tensor controller_down, Tensor? controller_down_scales, Tensor controller_up, "
          "Tensor? controller_up_scales, Tensor controller_bias, Tensor units, Tensor? bias, Tensor? inner_bias, "
          "str activation, bool multiply_by_controller) -> (Tensor, Tensor)");
  ops.def("feed_forward(Tensor(a!) hidden, Tensor[] weights, int[] settings, float epsilon) -> ()");
  ops.def("layers(Tensor(a!) hidden, Tensor(b!)[] keys, Tensor(c!)[] values, Tensor(d!)[] states, Tensor? mask, "
          "Tensor[] weights, int[] settings, float[] epsilons, int[] filled, Tensor(e!)? second, Tensor[] source_keys, "
          "Tensor[] source_values, Tensor? cross_mask, Tensor(f!)[] buckets, Tensor[] source_buckets) -> ()");
  ops.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("linear", TORCH_BOX(&linear));
  ops.impl("multiplicative", TORCH_BOX(&multiplicative));
  ops.impl("module_conv", TORCH_BOX(&module_conv));
  ops.impl("feed_forward", TORCH_BOX(&feed_forward));
  ops.impl("sparse_feed_forward", TORCH_BOX(&sparse_feed_forward));
  ops.impl("attention", TORCH_BOX(&attention));
  ops.impl("layers", TORCH_BOX(&layers));
}

// It takes no tensor, whose device would tell the backend.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
