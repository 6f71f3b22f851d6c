// Weights of a layer as an op is given them: one list of tensors, read one after the other.
#pragma once

#include <cstddef>
#include <optional>

#include "norm.h"
#include "projection.h"
#include "tensors.h"

namespace decode_layer {

// Some of a list, one after the other.
template <typename T>
struct Span {
  const T* first;
  size_t count;
};

class WeightList {
 public:
  explicit WeightList(Span<Tensor> weights) : weights_(weights) {}

  // weight, and the bias of LayerNorm.
  Norm norm(int64_t width, bool is_centered, double epsilon) {
    Norm norm;
    norm.weight = numbers_of(next("norm"), width, "norm weight");
    if (is_centered) norm.bias = numbers_of(next("norm"), width, "norm bias");
    norm.is_centered = is_centered;
    norm.epsilon = static_cast<float>(epsilon);
    return norm;
  }

  // 0: none. 1: weight. 3: gating, projection. One more with a bias behind them. Codes are followed by their scales.
  Projection projection(int64_t kind, int64_t width, int64_t outputs, int64_t modules) {
    STD_TORCH_CHECK(kind >= 0 && kind <= 4, "A projection is of kind 0 to 4, not ", kind, ".");
    if (kind == 0) return {};
    if (kind <= 2) {
      Projection found;
      found.map = Map::linear;
      found.matrix = matrix({outputs}, width, "weight");
      if (kind == 2) found.bias = numbers_of(next("bias"), outputs, "bias");
      return found;
    }
    const Weight gating = weight("gating"), projection = weight("projection");
    const std::optional<Tensor> bias = kind == 4 ? std::optional(next("bias")) : std::nullopt;
    const Projection found =
        multiplicative_of(gating.numbers, gating.scales, projection.numbers, projection.scales, bias, width);
    STD_TORCH_CHECK(found.gating.rows == modules && found.outputs() == outputs, "A multiplicative layer must have ",
                    modules, " modules and ", outputs, " outputs, not ", found.gating.rows, " and ", found.outputs(),
                    ".");
    return found;
  }

  // 0: none. 1: kernel and bias.
  Projection convolution(int64_t kind, int64_t width, int64_t modules, int64_t window, int64_t kernel_width) {
    STD_TORCH_CHECK(kind == 0 || kind == 1, "A convolution is of kind 0 or 1, not ", kind, ".");
    if (kind == 0) return {};
    STD_TORCH_CHECK(modules > 0 && width % modules == 0, "Modules must divide the width.");
    const int64_t channels = width / modules;
    const Weight kernel = weight("kernel");
    return convolution_of(kernel.numbers, kernel.scales, next("bias"), channels, channels, window, kernel_width);
  }

  // A matrix and its bias.
  LinearMap linear(int64_t width, int64_t outputs, const char* name) {
    LinearMap found;
    found.matrix = matrix({outputs}, width, name);
    found.bias = numbers_of(next("bias"), outputs, "bias");
    return found;
  }

  // The norm; the map to units, those of the SRUs, and the one back, each with a bias.
  RecurrentBranch branch(int64_t width, int64_t layers, bool is_centered, double epsilon) {
    RecurrentBranch found;
    found.norm = norm(width, is_centered, epsilon);
    const int64_t units = peek("the branch's first map").size(0);
    STD_TORCH_CHECK(units > 0, "The branch must have at least one unit.");
    found.in = linear(width, units, "the branch's first map");
    for (int64_t i = 0; i < layers; ++i) found.layers.push_back(linear(units, 3 * units, "the map of an SRU"));
    found.out = linear(units, width, "the branch's last map");
    return found;
  }

  Matrix matrix(const Shape& rows, int64_t width, const char* name) {
    const Weight found = weight(name);
    return matrix_of(found.numbers, found.scales, rows, width, name);
  }

  // up, the inner bias where `has_inner_bias`, down, and the bias where `has_bias`.
  DenseFeedForward dense(int64_t width, bool has_bias, bool has_inner_bias) {
    DenseFeedForward found;
    const int64_t units = peek("up").size(0);
    found.up = matrix({units}, width, "up");
    if (has_inner_bias) found.inner_bias = numbers_of(next("inner_bias"), units, "inner_bias");
    found.down = matrix({width}, units, "down");
    if (has_bias) found.bias = numbers_of(next("bias"), width, "bias");
    return found;
  }

  // Both matrices of the controller and its bias; up and down, or records of both in codes; bias and inner bias.
  SparseFeedForward sparse(int64_t width, bool has_bias, bool has_inner_bias) {
    SparseFeedForward found;
    const int64_t rank = peek("controller_down").size(0);
    found.controller_down = matrix({rank}, width, "controller_down");
    const Tensor& up = peek("controller_up");
    STD_TORCH_CHECK(up.dim() == 3, "controller_up must have shape (blocks, units, rank).");
    found.blocks = up.size(0);
    found.units = up.size(1);
    check_dimensions(found, width, rank);
    const int64_t rows = found.blocks * found.units;
    found.controller_up = matrix({found.blocks, found.units}, rank, "controller_up");
    found.controller_bias = numbers_of(next("controller_bias"), rows, "controller_bias");
    if (is_quantized(format_of(peek("units"), "units"))) {
      read_records(found, next("units"), width);
    } else {
      found.up = unit_rows_of(next("up"), found.blocks, found.units, width, "up");
      found.down = unit_rows_of(next("down"), found.blocks, found.units, width, "down");
    }
    if (has_bias) found.bias = numbers_of(next("bias"), width, "bias");
    if (has_inner_bias) found.inner_bias = numbers_of(next("inner_bias"), rows, "inner_bias");
    return found;
  }

  void check_end() const {
    STD_TORCH_CHECK(place_ == weights_.count, "There are ", weights_.count, " weights, and ", place_, " were read.");
  }

 private:
  struct Weight {
    const Tensor& numbers;  // or codes
    std::optional<Tensor> scales;
  };

  Weight weight(const char* name) {
    Weight found = {next(name), {}};
    if (is_quantized(format_of(found.numbers, name))) found.scales = next(name);
    return found;
  }

  const Tensor& peek(const char* name) const {
    STD_TORCH_CHECK(place_ < weights_.count, "The list of weights ends before ", name, ".");
    return weights_.first[place_];
  }

  const Tensor& next(const char* name) {
    const Tensor& found = peek(name);
    ++place_;
    return found;
  }

  Span<Tensor> weights_;
  size_t place_ = 0;
};

}  // namespace decode_layer
