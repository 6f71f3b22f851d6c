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
  Convolved(const float* tokens, int64_t rows, int64_t window, int64_t width, hfe::Upcoming* upcoming)
      : tokens_(tokens), rows_(rows), window_(window), width_(width), upcoming_(upcoming) {}

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
    Operands operands = inputs_->operands(convolution.matrix.format);
    operands.upcoming = upcoming_;
    multiply(convolution.matrix, operands, out, size);
    add_bias(convolution.bias, size, out, size, count);
  }

 private:
  const float* tokens_;
  int64_t rows_, window_, width_;
  hfe::Upcoming* upcoming_;
  int64_t kernel_width_ = 0;
  Format format_ = Format::float32;
  Room<float> images_;
  std::optional<Inputs> inputs_;
};

// The last tokens of each row, (rows, window, width), of which `token` is the last one; the state moves on to it.
Room<float> window_of(const float* token, const State& state, int64_t rows, int64_t window, int64_t width) {
  Room<float> tokens(rows * window * width);
  const int64_t before = (window - 1) * width;
  for (int64_t r = 0; r < rows; ++r) {
    float *const row = tokens + r * window * width, *const kept = state.data + r * state.stride;
    std::copy(kept, kept + before, row);
    std::copy(token + r * width, token + (r + 1) * width, row + before);
    std::copy(row + width, row + window * width, kept);
  }
  return tokens;
}

// `x`, (rows, width), through a map and its convolution; `x` itself where there is none.
const float* apply_windowed(const WindowedMap& layer, const float* x, const State& state, int64_t rows, int64_t window,
                            int64_t width, hfe::Upcoming* upcoming, float* room, float* out) {
  if (!layer.map) return x;
  if (!layer.conv) {
    Mapped(x, rows, width).apply(layer.map, out, {});
    return out;
  }
  Mapped(x, rows, width).apply(layer.map, room, {&layer.conv});
  const Room<float> tokens = window_of(room, state, rows, window, width);
  Convolved(tokens, rows, window, width, upcoming).apply(layer.conv, out);
  return out;
}

void ask_for_keys(const KeyPart& part, int64_t rows, int64_t heads, int64_t head_dim) {
  if (part.count == 0) return;
  ask_for_tokens(part.keys, rows, heads, head_dim, part.count);
  ask_for_tokens(part.values, rows, heads, head_dim, part.count);
}

AttendParams attend_params(int64_t rows, int64_t heads, int64_t head_dim, const float* mask) {
  AttendParams params;
  params.rows = rows;
  params.heads = heads;
  params.head_dim = head_dim;
  params.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  params.mask = mask;
  return params;
}

void attend_alike(const AttentionLayer& layer, const AttentionStep& step, const float* query_keys, const float* values,
                  float* out) {
  HashedParams params;
  params.rows = layer.rows;
  params.heads = layer.heads;
  params.head_dim = layer.width / layer.heads;
  params.source = {step.source, step.source_buckets};
  params.target = {{step.keys, step.values, step.filled}, step.buckets};
  params.query_keys = query_keys;
  params.values = values;
  params.mask = step.mask;
  params.out = out;
  attend_hashed(layer.hashing, params);
}

}  // namespace

void attention(const AttentionLayer& layer, Streams streams, const AttentionStep& step) {
  const int64_t rows = layer.rows, width = layer.width, all = rows * width, window = layer.window;
  Room<float> room(5 * all);
  float *const x = room, *const query = room + all, *const key = room + 2 * all, *const value = room + 3 * all,
               *const out = room + 4 * all;
  const int64_t head_dim = width / layer.heads;
  const KeyPart target = {step.keys, step.values, step.filled + 1};
  if (!layer.hashing) {
    ask_for_keys(step.source, rows, layer.heads, head_dim);
    ask_for_keys(target, rows, layer.heads, head_dim);
  }
  normalize(layer.norm, streams.from, rows, width, x);
  {
    Mapped mapped(x, rows, width);
    if (window == 0) {
      mapped.apply(layer.query, query, {&layer.key});
      if (layer.key) mapped.apply(layer.key, key, {&layer.value});
      mapped.apply(layer.value, value, {&layer.output});
    } else {
      mapped.apply(layer.shared, out, {&layer.query, &layer.key, &layer.value, &layer.output});
      const Room<float> tokens = window_of(out, step.state, rows, window, width);
      Convolved convolved(tokens, rows, window, width, step.upcoming);
      convolved.apply(layer.query, query);
      if (layer.key) convolved.apply(layer.key, key);
      convolved.apply(layer.value, value);
    }
  }
  if (layer.hashing) {
    if (layer.key) {
      for (int64_t i = 0; i < all; ++i) query[i] = (query[i] + key[i]) / 2.0f;
    }
    attend_alike(layer, step, query, value, out);
  } else {
    const float* const key_found = layer.key ? key : query;
    write_token(step.keys, key_found, rows, layer.heads, head_dim, step.filled);
    write_token(step.values, value, rows, layer.heads, head_dim, step.filled);
    AttendParams params = attend_params(rows, layer.heads, head_dim, step.mask);
    params.parts[0] = step.source;
    params.parts[1] = target;
    params.queries = query;
    params.out = out;
    attend(params);
  }
  const float* added = out;
  if (layer.output) {
    Mapped(out, rows, width).apply(layer.output, x, {});
    added = x;
  }
  for (int64_t i = 0; i < all; ++i) streams.to[i] += added[i];
}

void cross_attention(const CrossAttentionLayer& layer, Streams streams, const CrossAttentionStep& step) {
  const int64_t rows = layer.rows, width = layer.width, all = rows * width, window = layer.window;
  Room<float> room(4 * all);
  float *const x = room, *const query = room + all, *const out = room + 2 * all, *const shared = room + 3 * all;
  ask_for_keys(step.source, rows, layer.heads, width / layer.heads);
  normalize(layer.norm, streams.from, rows, width, x);
  AttendParams params = attend_params(rows, layer.heads, width / layer.heads, step.mask);
  params.parts[0] = step.source;
  params.queries = apply_windowed(layer.query, x, step.query_state, rows, window, width, step.upcoming, shared, query);
  params.out = out;
  attend(params);
  const float* const added = apply_windowed(layer.output, out, step.output_state, rows, window, width, step.upcoming, shared, x);
  for (int64_t i = 0; i < all; ++i) streams.to[i] += added[i];
}

}  // namespace decode_layer
