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
    Projection found;
    if (kind == 0) return found;
    if (kind <= 2) {
      found.map = Map::linear;
      found.matrix = matrix({outputs}, width, "weight");
    } else {
      found.map = Map::multiplicative;
      STD_TORCH_CHECK(modules > 0 && outputs % modules == 0, "Modules must divide the outputs.");
      found.gating = matrix({modules}, width, "gating");
      const int64_t size = outputs / modules;
      const bool is_float = !is_quantized(format_of(peek("projection"), "projection"));
      found.matrix = is_float ? matrix({width}, size, "projection") : matrix({size}, width, "projection");
    }
    if (kind % 2 == 0) found.bias = numbers_of(next("bias"), outputs, "bias");
    return found;
  }

  // 0: none. 1: kernel and bias.
  Projection convolution(int64_t kind, int64_t width, int64_t modules, int64_t window, int64_t kernel_width) {
    STD_TORCH_CHECK(kind == 0 || kind == 1, "A convolution is of kind 0 or 1, not ", kind, ".");
    Projection found;
    if (kind == 0) return found;
    STD_TORCH_CHECK(modules > 0 && width % modules == 0, "Modules must divide the width.");
    found.map = Map::convolution;
    found.channels = width / modules;
    found.kernel_width = kernel_width;
    const int64_t seen = found.channels * window * kernel_width;
    const Tensor& kernel = peek("kernel");
    if (is_quantized(format_of(kernel, "kernel"))) {
      found.matrix = matrix({found.channels}, seen, "kernel");
    } else {
      next("kernel");
      check_shape(kernel, {found.channels, found.channels, window, kernel_width}, "kernel");
      STD_TORCH_CHECK(kernel.is_contiguous(), "kernel must be contiguous.");
      found.matrix.data = kernel.data_ptr();
      found.matrix.rows = found.channels;
      found.matrix.width = seen;
      found.matrix.format = format_of(kernel, "kernel");
      found.matrix.stride = row_bytes(found.matrix.format, seen);
    }
    found.bias = numbers_of(next("bias"), found.channels, "bias");
    return found;
  }

  Matrix matrix(const Shape& rows, int64_t width, const char* name) {
    const Tensor& weight = next(name);
    std::optional<Tensor> scales;
    if (is_quantized(format_of(weight, name))) scales = next(name);
    return matrix_of(weight, scales, rows, width, name);
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
