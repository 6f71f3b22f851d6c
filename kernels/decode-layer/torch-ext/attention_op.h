#pragma once

#include <optional>
#include <vector>

#include "../decode_layer_cpu/attention.h"
#include "../decode_layer_cpu/weight_list.h"

// What a call of `attention` was given, found to fit together.
struct AttentionCall {
  decode_layer::AttentionLayer layer;
  float* hidden = nullptr;
  decode_layer::CacheView keys, values;
  float* state = nullptr;
  const float* mask = nullptr;
  int64_t filled = 0;

  void run() const;
};

AttentionCall attention_call(const hfe::Tensor& hidden, const hfe::Tensor& keys, const hfe::Tensor& values,
                             const hfe::Tensor* state, const hfe::Tensor* mask, decode_layer::Span<hfe::Tensor> weights,
                             decode_layer::Span<int64_t> settings, double epsilon, int64_t filled);

// The op `attention`; see decode_layer/layers.py.
void attention(hfe::Tensor hidden, hfe::Tensor keys, hfe::Tensor values, std::optional<hfe::Tensor> state,
               std::optional<hfe::Tensor> mask, std::vector<hfe::Tensor> weights, std::vector<int64_t> settings,
               double epsilon, int64_t filled);
