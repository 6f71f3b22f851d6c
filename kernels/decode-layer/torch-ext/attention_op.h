#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "../decode_layer_cpu/attention.h"
#include "../decode_layer_cpu/weight_list.h"

// What calls of attention were given, found to fit together.
struct AttentionCall {
  decode_layer::AttentionLayer layer;
  decode_layer::AttentionStep step;
};

struct CrossAttentionCall {
  decode_layer::CrossAttentionLayer layer;
  decode_layer::CrossAttentionStep step;
};

// Keys and values of a source, and where layers hash their buckets.
struct SourceTensors {
  const hfe::Tensor& keys;
  const hfe::Tensor& values;
  const hfe::Tensor* buckets = nullptr;
};

// Gives the state of so many numbers a row that a layer asks for.
using NextState = std::function<decode_layer::State(int64_t size)>;

// Of rows of `width` numbers; `buckets` of the tokens before this one, of a layer that hashes.
AttentionCall attention_call(int64_t rows, int64_t width, const hfe::Tensor& keys, const hfe::Tensor& values,
                             const NextState& next_state, const SourceTensors* source, const hfe::Tensor* mask,
                             decode_layer::Span<hfe::Tensor> weights, decode_layer::Span<int64_t> settings,
                             double epsilon, int64_t filled, const hfe::Tensor* buckets = nullptr);

CrossAttentionCall cross_attention_call(int64_t rows, int64_t width, const SourceTensors& source,
                                        const NextState& next_state, const hfe::Tensor* mask,
                                        decode_layer::Span<hfe::Tensor> weights, decode_layer::Span<int64_t> settings,
                                        double epsilon);

// Rows of hidden states, float32 and contiguous, whatever dimensions of 1 stand between them.
struct Hidden {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t width = 0;

  explicit Hidden(const hfe::Tensor& tensor);
};

// The op `attention`; see decode_layer/layers.py.
void attention(hfe::Tensor hidden, hfe::Tensor keys, hfe::Tensor values, std::optional<hfe::Tensor> state,
               std::optional<hfe::Tensor> mask, std::vector<hfe::Tensor> weights, std::vector<int64_t> settings,
               double epsilon, int64_t filled);
