#include "attention.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

namespace decode_layer {
namespace {

// The maps of all rows from their input, (rows, width).
class Mapped {
 public:
  Mapped(const float* x, int64_t rows, int64_t width) : x_(x), rows_(rows), width_(width), inputs_(x, width, rows, width) {}

  // Meanwhile the weights of the maps that are next are asked for, where there is time for it.
  void apply(const Projection& projection, float* out, std::initializer_list<const Projection*> next) {
    if (projection.map == Map::multiplicative) {
      hfe::Ahead ahead;
      for (const Projection* one : next) ask_for(*one, ahead);
      multiplicative(projection, inputs_, out, width_, ahead);
      return;
    }
    multiply(projection.matrix, inputs_, out, width_);
    add_bias(projection.bias, width_, out, width_, rows_);
  }

 private:
  const float* x_;
  int64_t rows_, width_;
  Inputs inputs_;
};

// The convolutions of all rows over their last tokens, (rows, window, width).
class Convolved {
 public:
  Convolved(const float* tokens, int64_t rows, int64_t window, int64_t width)
      : tokens_(tokens), rows_(rows), window_(window), width_(width) {}

  void apply(const Projection& convolution, float* out) {
    const int64_t modules = width_ / convolution.channels, count = rows_ * modules;
    const int64_t size = convolution.matrix.rows;
    if (!inputs_ || convolution.kernel_width != kernel_width_ || convolution.matrix.format != format_) {
      kernel_width_ = convolution.kernel_width;
      format_ = convolution.matrix.format;
      images_ = Room<float>(count * convolution.matrix.width);
      for (int64_t r = 0; r < rows_; ++r) {
        write_images(convolution, tokens_ + r * window_ * width_, window_, width_,
                     images_ + r * modules * convolution.matrix.width);
      }
      inputs_.emplace(images_, convolution.matrix.width, count, convolution.matrix.width);
    }
    multiply(convolution.matrix, *inputs_, out, size);
    add_bias(convolution.bias, size, out, size, count);
  }

 private:
  const float* tokens_;
  int64_t rows_, window_, width_;
  int64_t kernel_width_ = 0;
  Format format_ = Format::float32;
  Room<float> images_;
  std::optional<Inputs> inputs_;
};

}  // namespace

void attention(const AttentionLayer& layer, float* hidden, const CacheView& keys, const CacheView& values, float* state,
               const float* mask, int64_t filled) {
  const int64_t rows = layer.rows, width = layer.width, all = rows * width, window = layer.window;
  Room<float> room(5 * all);
  float *const x = room, *const query = room + all, *const key = room + 2 * all, *const value = room + 3 * all,
               *const out = room + 4 * all;
  const int64_t head_dim = width / layer.heads;
  ask_for_tokens(keys, rows, layer.heads, head_dim, filled + 1);
  ask_for_tokens(values, rows, layer.heads, head_dim, filled + 1);
  normalize(layer.norm, hidden, rows, width, x);
  const float* key_found = key;
  {
    Mapped mapped(x, rows, width);
    if (window == 0) {
      mapped.apply(layer.query, query, {&layer.key});
      mapped.apply(layer.key, key, {&layer.value});
      mapped.apply(layer.value, value, {&layer.output});
    } else {
      mapped.apply(layer.shared, out, {&layer.query, &layer.key, &layer.value, &layer.output});
      Room<float> tokens(window * all);
      const int64_t before = (window - 1) * width;
      for (int64_t r = 0; r < rows; ++r) {
        float *const row = tokens + r * window * width, *const kept = state + r * before;
        std::copy(kept, kept + before, row);
        std::copy(out + r * width, out + (r + 1) * width, row + before);
        std::copy(row + width, row + window * width, kept);
      }
      Convolved convolved(tokens, rows, window, width);
      convolved.apply(layer.query, query);
      if (layer.key) {
        convolved.apply(layer.key, key);
      } else {
        key_found = query;
      }
      convolved.apply(layer.value, value);
    }
  }
  write_token(keys, key_found, rows, layer.heads, head_dim, filled);
  write_token(values, value, rows, layer.heads, head_dim, filled);
  AttendParams params;
  params.rows = rows;
  params.heads = layer.heads;
  params.head_dim = head_dim;
  params.count = filled + 1;
  params.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  params.keys = keys;
  params.values = values;
  params.queries = query;
  params.mask = mask;
  params.out = out;
  attend(params);
  const float* added = out;
  if (layer.output) {
    Mapped(out, rows, width).apply(layer.output, x, {});
    added = x;
  }
  for (int64_t i = 0; i < all; ++i) hidden[i] += added[i];
}

}  // namespace decode_layer
