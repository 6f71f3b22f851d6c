// The ops that Python sees: checks of what is given, room for results, and the calls. What they mean is said in
// decode_layer/__init__.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../decode_layer_cpu/matrix.h"
#include "../decode_layer_cpu/modules.h"
#include "../decode_layer_cpu/parallel.h"
#include "../decode_layer_cpu/tensors.h"
#include "registration.h"

namespace {

using decode_layer::FloatRows;
using decode_layer::Inputs;
using decode_layer::Matrix;
using decode_layer::ModuleConv;
using decode_layer::ModuleImages;
using decode_layer::Multiplicative;
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

Tensor multiplicative(Tensor x, Tensor gating, std::optional<Tensor> gating_scales, Tensor projection,
                      std::optional<Tensor> projection_scales, std::optional<Tensor> bias) {
  x = with_contiguous_rows(x, "x");
  const Multiplicative layer =
      decode_layer::multiplicative_of(gating, gating_scales, projection, projection_scales, bias, x.size(1));
  const int64_t tokens = x.size(0), outputs = layer.modules() * layer.size();
  Tensor y = torch::stable::new_empty(x, {tokens, outputs});
  FloatRows from(x, "x"), to(y, "y");
  const float* const numbers = from.read();
  decode_layer::for_each_part(tokens, layer.inputs() * outputs, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      decode_layer::multiplicative(layer, numbers + t * from.stride(), to.numbers() + t * to.stride());
    }
  });
  to.write();
  return y;
}

// Images of so many bytes are worked on together.
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
  const ModuleConv conv = decode_layer::module_conv_of(kernel, scales, bias, channels, window, width);
  const int64_t tokens = batch * length, row = modules * channels, outputs = modules * conv.size();
  Tensor y = torch::stable::new_empty(windows, {batch, length, outputs});
  if (tokens == 0) return y;
  const int64_t held = windows.numel() / std::max<int64_t>(1, row);
  Tensor rows = torch::stable::view(windows, {held, row}), results = torch::stable::view(y, {tokens, outputs});
  FloatRows from(rows, "windows"), to(results, "y");
  const float* const numbers = from.read();
  const int64_t together = std::max<int64_t>(1, kImageBytes / (4 * row * window * width));
  const int64_t parts = (tokens + together - 1) / together;
  decode_layer::for_each_part(parts, together * outputs * window * width * channels, [&](int64_t first, int64_t last) {
    std::vector<const float*> seen(together * window);
    for (int64_t part = first; part < last; ++part) {
      const int64_t begin = part * together, count = std::min(together, tokens - begin);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t token = begin + t;
        const int64_t start = in_pieces ? token * window : token / length * (length + window - 1) + token % length;
        for (int64_t a = 0; a < window; ++a) seen[t * window + a] = numbers + (start + a) * row;
      }
      ModuleImages(conv, seen.data(), count, modules).convolve(conv, to.numbers() + begin * outputs);
    }
  });
  to.write();
  return y;
}

std::string cpu_capability() { return decode_layer::cpu_capability(); }

}  // namespace

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor");
  ops.def("multiplicative(Tensor x, Tensor gating, Tensor? gating_scales, Tensor projection, "
          "Tensor? projection_scales, Tensor? bias) -> Tensor");
  ops.def("module_conv(Tensor windows, Tensor kernel, Tensor? scales, Tensor? bias, int window, int width) -> Tensor");
  ops.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("linear", TORCH_BOX(&linear));
  ops.impl("multiplicative", TORCH_BOX(&multiplicative));
  ops.impl("module_conv", TORCH_BOX(&module_conv));
}

// It takes no tensor, whose device would tell the backend.
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
